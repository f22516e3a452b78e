"""The Python source of an engine, read without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Assignment = ast.Assign | ast.AnnAssign


class EngineSource:
    """The Python source of one engine: `root` is the directory that holds the package `sglang`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def find(self, module: str, name: str) -> ast.AST | None:
        """The definition of a dotted name in a module, or None."""
        file = self.file(module)
        if file is None:
            return None
        node: ast.AST = _parse(file)
        for part in name.split("."):
            found = _member(node, part)
            if found is None:
                return None
            node = found
        return node

    def signature(self, module: str, name: str) -> str:
        """Of a function or a class's `__init__` its parameters, of a constant its value. Raises `LookupError`."""
        node = self.find(module, name)
        if node is None:
            raise LookupError("no such module" if self.file(module) is None else "no such name in it")
        return signature_of(node)


@lru_cache(maxsize=16)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _member(node: ast.AST, name: str) -> ast.AST | None:
    """The last definition of `name` directly in a module or class body, also under an `if` or `try`."""
    found = None
    for statement in _statements(node):
        if name in defined(statement):
            found = statement
    return found


def defined(statement: ast.AST) -> list[str]:
    """The names that one statement defines."""
    if isinstance(statement, ast.ClassDef | Function):
        return [statement.name]
    if isinstance(statement, Assignment) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, ast.If | ast.Try):
            yield from _statements(child)


def signature_of(node: ast.AST) -> str:
    """What `Target.signature` is compared with: parameters of a function or a class's `__init__`, or a value."""
    if isinstance(node, Assignment):
        assert node.value is not None
        return ast.unparse(node.value)
    if isinstance(node, ast.ClassDef):
        init = _member(node, "__init__")
        return signature_of(init) if init is not None else "()"
    assert isinstance(node, Function)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = len(positional) - len(arguments.defaults)
    words = [a.arg + ("=" if i >= defaults else "") for i, a in enumerate(positional)]
    if arguments.posonlyargs:
        words.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        words.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        words.append("*")
    words += [
        a.arg + ("=" if d is not None else "")
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        words.append("**" + arguments.kwarg.arg)
    return f"({', '.join(words)})"
