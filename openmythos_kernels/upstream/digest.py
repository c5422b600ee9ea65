"""Digests of classes from their syntax trees, the same on every version of Python.

A class's digest covers its body and every module-level statement that binds a name which the body uses, directly or
through other statements: functions, imports, constants. Other classes are left out, as they are judged on their own.
Docstrings, comments, annotations and formatting do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

# Annotations compute nothing; the other fields differ between versions of Python for the same text.
_SKIPPED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx", "type_ignores"}


def class_digests(source: str) -> dict[str, str]:
    """Class name -> digest, for every class at the top of a module's source."""
    tree = ast.parse(source)
    return {node.name: digest(node, tree) for node in tree.body if isinstance(node, ast.ClassDef)}


def digest(node: ast.ClassDef, tree: ast.Module) -> str:
    """The digest of a class within its module."""
    text = "\n".join([_written(node), *sorted(map(_written, used_by(node, tree)))])
    return hashlib.sha256(text.encode()).hexdigest()


def used_by(node: ast.AST, tree: ast.Module) -> list[ast.stmt]:
    """The module's statements, except classes, that bind what `node` uses, directly or through one another."""
    binders: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.ClassDef):
            for name in bound(statement):
                binders.setdefault(name, []).append(statement)
    found: list[ast.stmt] = []
    waiting = [node]
    while waiting:
        for name in _loaded(waiting.pop()):
            for statement in binders.get(name, ()):
                if statement not in found:
                    found.append(statement)
                    waiting.append(statement)
    return found


def bound(statement: ast.stmt) -> set[str]:
    """The names that a module-level statement binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    names = set()
    for child in ast.walk(statement):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(child.name)
    return names


def _loaded(node: ast.AST) -> Iterator[str]:
    """The names that a node reads, except in annotations."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field not in _SKIPPED:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _loaded(child)


def _written(node: object) -> str:
    """A node as text. Not by `ast.dump`, whose output differs between versions of Python."""
    if isinstance(node, list):
        return "[" + ",".join(map(_written, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED:
            continue
        if field == "body" and isinstance(value, list):
            value = _without_docstring(value)
        if isinstance(node, ast.JoinedStr):
            # Python 3.12 adds empty parts.
            value = [part for part in value if not (isinstance(part, ast.Constant) and part.value == "")]
        if value is not None and value != []:
            fields.append(f"{field}={_written(value)}")
    return f"{type(node).__name__}({','.join(sorted(fields))})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if text else body
