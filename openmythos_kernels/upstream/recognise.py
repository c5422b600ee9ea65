"""Judges whether a class runs known code: that of a published `open_mythos` or our own, and not patched."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch.nn as nn

from openmythos_kernels.upstream.digest import bound, digest, used_by

# Class name -> digest -> the release or head it was first seen in. Written by `python -m tools.digests`.
ACCEPTED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "accepted.json").read_text())
# A module with these classes is open_mythos or a fork of it; other packages have an RMSNorm, too.
_DISTINCTIVE = {"OpenMythos", "RecurrentBlock", "MLAttention"}
_OF_PYTHON = {"__annotate__", "__annotate_func__"}  # functions that Python itself adds to a class


@dataclass(frozen=True)
class Judgement:
    """What a class is.

    Attributes:
        name: of the open_mythos class that it is, or seems to be; empty for all others.
        reason: why it does not count as that class; empty if it does.
    """

    name: str = ""
    reason: str = ""

    @property
    def known(self) -> bool:
        return bool(self.name) and not self.reason


def judge(cls: type) -> Judgement:
    """Judges by its code, wherever that is, whether `cls` is open_mythos' class of its name.

    The judgement is not cached, as methods and functions can be replaced at run time. Takes about a millisecond.
    """
    if cls.__name__ not in ACCEPTED:
        parents = (judge(base) for base in cls.__mro__[1:] if base.__name__ in ACCEPTED)
        parent = next((found for found in parents if found.name), None)
        if parent is None:
            return Judgement()
        return Judgement(parent.name, f"{cls.__name__} is a subclass of {parent.name}: its own code is left alone")
    source = _source(cls)
    name = cls.__name__
    if source is None:
        return Judgement()
    node = source.classes[name]
    if source.digest(node) not in ACCEPTED[name]:
        fork = source.classes.keys() >= _DISTINCTIVE
        return Judgement(name, f"{name}'s code is not that of a known version of open_mythos") if fork else Judgement()
    if type(cls) is not type:
        return Judgement(name, f"{name} has a metaclass, {type(cls).__name__}")
    if cls.__bases__ != (nn.Module,):
        return Judgement(name, f"{name} has other base classes than open_mythos' own")
    return Judgement(name, _patched(cls, source))


def patched(cls: type) -> str:
    """Which method of the class, or function that it uses, was replaced since the module was imported; empty: none."""
    source = _source(cls)
    return "" if source is None else _patched(cls, source)


class _Source:
    """A module's syntax tree and compiled code."""

    def __init__(self, text: str, file: str):
        self.tree = ast.parse(text)
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        self.code = dict(_inner(compile(text, file, "exec", dont_inherit=True), ""))
        self._digests: dict[str, str] = {}
        self._used: dict[str, list[ast.stmt]] = {}

    def digest(self, node: ast.ClassDef) -> str:
        if node.name not in self._digests:
            self._digests[node.name] = digest(node, self.tree)
        return self._digests[node.name]

    def used_by(self, node: ast.ClassDef) -> list[ast.stmt]:
        if node.name not in self._used:
            self._used[node.name] = used_by(node, self.tree)
        return self._used[node.name]


def _source(cls: type) -> _Source | None:
    """The source of the module that defines the class; None if it cannot be read."""
    made = (cls.__dict__.get(name) for name in ("__init__", "forward"))
    files: list[str | None] = [f.__code__.co_filename for f in made if isinstance(f, FunctionType)]
    files.insert(0, getattr(sys.modules.get(cls.__module__), "__file__", None))
    for file in files:
        if file and (source := _read(file, _text(file))) is not None and cls.__name__ in source.classes:
            return source
    return None


def _text(file: str) -> str:
    linecache.checkcache(file)
    return "".join(linecache.getlines(file))


@functools.lru_cache(maxsize=32)
def _read(file: str, text: str) -> _Source | None:
    try:
        return _Source(text, file) if text else None
    except SyntaxError:
        return None


def _inner(code: CodeType, prefix: str) -> Iterator[tuple[str, CodeType]]:
    """The functions and methods of a module: qualified name, code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield prefix + constant.co_name, constant
            yield from _inner(constant, f"{prefix}{constant.co_name}.")


def _patched(cls: type, source: _Source) -> str:
    node = source.classes[cls.__name__]
    written = {name for statement in node.body for name in bound(statement)}
    for name, value in cls.__dict__.items():
        function = _function(value)
        if name not in written and function is not None and name not in _OF_PYTHON:
            return f"{cls.__name__}.{name} was added"
        method = name in written and callable(value) and not isinstance(value, type)
        if method and (function is None or function.__code__ != source.code.get(f"{cls.__name__}.{name}")):
            return f"{cls.__name__}.{name} was replaced"
    own = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
    first = next((f for f in map(_function, cls.__dict__.values()) if f is not None), None)
    own = own if first is None else first.__globals__
    for statement in source.used_by(node):
        for name in bound(statement):
            if name in own and (reason := _rebound(name, statement, own[name], source)):
                return f"{reason}, which {cls.__name__} uses"
    return ""


def _function(value: Any) -> FunctionType | None:
    """The function of a method, also of a static, class or decorated method."""
    value = getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _rebound(name: str, statement: ast.stmt, value: Any, source: _Source) -> str:
    """Why a name of the module no longer means what its statement says; empty if it does."""
    if isinstance(statement, ast.FunctionDef):
        function = _function(value)
        return "" if function is not None and function.__code__ == source.code.get(name) else f"{name} was replaced"
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        meant = _imported(name, statement)
        return "" if meant is _UNKNOWN or meant is value else f"{name} was replaced"
    if name == "_HAS_FLASH_ATTN" and value:
        return "flash_attn computes in bfloat16"
    return ""


_UNKNOWN = object()


def _imported(name: str, statement: Any) -> Any:
    """What an import binds to a name, if the imported module is loaded."""
    for alias in statement.names:
        if isinstance(statement, ast.Import):
            target = alias.name if alias.asname else alias.name.split(".")[0]
            if name == (alias.asname or target):
                return sys.modules.get(target, _UNKNOWN)
        elif name == (alias.asname or alias.name) and not statement.level:
            origin = sys.modules.get(statement.module)
            return getattr(origin, alias.name, sys.modules.get(f"{statement.module}.{alias.name}", _UNKNOWN))
    return _UNKNOWN
