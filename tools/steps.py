"""The calls that a function makes, in the order in which they run: what the probes read."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Step:
    """One call: the last part of what is called, the call itself, and the `try` bodies that it stands in."""

    name: str
    call: ast.Call
    guards: tuple[ast.Try, ...]

    def keyword(self, name: str) -> str | None:
        """The source text of a keyword argument."""
        return next((ast.unparse(word.value) for word in self.call.keywords if word.arg == name), None)

    def caught(self, *exceptions: str) -> bool:
        """Whether one of these exceptions, or everything, is caught around this call."""
        wanted = {*exceptions, "Exception", "BaseException", "None"}
        return any(wanted & _caught(handler) for guard in self.guards for handler in guard.handlers)


def steps(function: Function, owner: ast.ClassDef | None = None) -> tuple[Step, ...]:
    """Every call in `function`; a call of one of `owner`'s own methods is preceded by the steps inside it."""
    methods = {node.name: node for node in owner.body if isinstance(node, Function)} if owner else {}
    return tuple(_walk(function.body, (), methods, (function.name,)))


def steps_in(statements: Sequence[ast.AST]) -> Iterator[Step]:
    """Every call in some statements."""
    return _walk(statements, (), {}, ())


def _walk(
    nodes: Sequence[ast.AST],
    guards: tuple[ast.Try, ...],
    methods: dict[str, Function],
    inside: tuple[str, ...],
) -> Iterator[Step]:
    for node in nodes:
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue  # defined here, not run here
        if isinstance(node, ast.Try):
            yield from _walk(node.body, (*guards, node), methods, inside)
            yield from _walk([*node.handlers, *node.orelse, *node.finalbody], guards, methods, inside)
            continue
        yield from _walk(list(ast.iter_child_nodes(node)), guards, methods, inside)
        if isinstance(node, ast.Call):
            name = called(node)
            method = methods.get(name)
            if method is not None and name not in inside and ast.unparse(node.func) == f"self.{name}":
                yield from _walk(method.body, guards, methods, (*inside, name))
            yield Step(name, node, guards)


def called(call: ast.Call) -> str:
    """The last part of the name of what is called; "" for anything without a name."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _caught(handler: ast.ExceptHandler) -> set[str]:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) if kind is not None else "None" for kind in types}
