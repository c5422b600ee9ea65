"""A digest of the code that computes a run, so that a result is not taken for that of other code.

It covers a run's function and what it reaches of `openmythos.lab` by name: functions, classes, whole modules and plain
constants. It does not cover the model, the trainer and PyTorch, whose versions stand beside a result, nor `judge` and
`draw`, which only read results: a better plot does not train anything again. Comments, docstrings and line breaks do
not count.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

HOME = "openmythos.lab"


def code_digest(function: Callable) -> str:
    """Hexadecimal digest of the code behind `function`, a function or a `functools.partial` of one."""
    parts: dict[str, str] = {}
    home = getattr(inspect.unwrap(getattr(function, "func", function)), "__module__", HOME)
    _follow("compute", function, parts, (HOME, home))
    return hashlib.sha256("\n".join(f"{name}: {parts[name]}" for name in sorted(parts)).encode()).hexdigest()


def _follow(name: str, value: Any, parts: dict[str, str], homes: tuple[str, ...]) -> None:
    """Adds `value` and what it reaches to `parts`, full name -> code."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        parts[name] = repr(value)
        return
    if isinstance(value, (dict, list, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            _follow(f"{name}[{key!r}]", entry, parts, homes)
        return
    value = inspect.unwrap(getattr(value, "func", value))
    module = value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
    if not any(module == home or module.startswith(home + ".") for home in homes):
        return
    full = module if isinstance(value, ModuleType) else f"{module}.{getattr(value, '__qualname__', name)}"
    if full in parts or not isinstance(value, (FunctionType, type, ModuleType)):
        return
    parts[full] = _tree(value)
    scope = vars(value if isinstance(value, ModuleType) else sys.modules[module])
    names = set(scope) if isinstance(value, ModuleType) else _names(value)
    for inner in sorted(names & set(scope)):
        if not inner.startswith("__"):
            _follow(f"{module}.{inner}", scope[inner], parts, homes)


def _tree(value: Any) -> str:
    """Its syntax tree without docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _names(value: Any) -> set[str]:
    """Names that a function or the methods of a class may look up in their module, bases included."""
    if isinstance(value, type):
        own = {base.__name__ for base in value.__bases__}
        return own.union(*(_names(one) for one in vars(value).values() if isinstance(one, (FunctionType, type))))
    codes, found = [value.__code__], set()
    while codes:
        code = codes.pop()
        found |= set(code.co_names)
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    return found
