"""Fingerprints of the engine's functions that patches replace or rely on: which bodies a person has read.

A wrapper at a stable seam still leans on what the wrapped body does. When a release changes such a body,
a maintainer has to read it again. The record names the releases at which each body changed, oldest first; `null`
is where it is no longer there.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from mmlane.engine.source import EngineSource
from mmlane.patching import PatchSpec

RECORD = Path(__file__).parent.parent / "tests" / "contract" / "fingerprints.json"

Bodies = Mapping[str, str | None]
Record = Mapping[str, Mapping[str, str | None]]


def paths(spec: PatchSpec, version: Version) -> set[str]:
    """The bodies that matter to a patch on one release."""
    return {*(target.path for target in spec.targets_on(version)), *spec.relies_on}


def all_paths(specs: Iterable[PatchSpec]) -> list[str]:
    """The bodies that matter on any release."""
    return sorted({path for spec in specs for path in (*(t.path for t in spec.targets), *spec.relies_on)})


def bodies(source: EngineSource, wanted: Iterable[str]) -> Bodies:
    """The fingerprint of each body, None where it is not there."""
    return {path: None if (node := locate(source, path)) is None else fingerprint(node) for path in wanted}


def locate(source: EngineSource, path: str) -> ast.AST | None:
    """The definition at a dotted path whose front names a module."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        if source.file(module) is not None:
            return source.find(module, ".".join(parts[split:]))
    return None


def fingerprint(node: ast.AST) -> str:
    """A hash of a definition: not of its comments, docstrings, annotations or layout. The same on every Python."""
    return hashlib.sha256("\n".join(_words(node)).encode()).hexdigest()[:12]


_UNREAD = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}


def _words(node: object) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                value = _without_docstring(value)
            if name not in _UNREAD and value not in (None, []):
                yield f"{name}="
                yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _words(item)
        yield "]"
    else:
        yield repr(node)


def _without_docstring(body: Sequence[ast.stmt]) -> Sequence[ast.stmt]:
    match body[0]:
        case ast.Expr(value=ast.Constant(value=str())):
            return body[1:]
    return body


# --- the record --------------------------------------------------------------------------------------------


def load(file: Path = RECORD) -> Record:
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    return record


def recorded(record: Record, version: Version) -> Bodies:
    """The bodies of a release according to the record: those of the last release at which each changed."""
    found: dict[str, str | None] = {}
    for path, changes in record.items():
        earlier = [Version(since) for since in changes if Version(since) <= version]
        found[path] = changes[str(max(earlier))] if earlier else None
    return found


def summarize(by_version: Mapping[Version, Bodies]) -> Record:
    """The record of what was found on each release."""
    record: dict[str, dict[str, str | None]] = {}
    for version in sorted(by_version):
        for path, body in by_version[version].items():
            changes = record.setdefault(path, {})
            before = list(changes.values())[-1] if changes else None
            if body != before:
                changes[str(version)] = body
    return record


def differences(before: Bodies, now: Bodies) -> dict[str, str]:
    """Each path whose body is not what it was: changed, gone, or new."""
    told = {}
    for path in sorted({*before, *now}):
        old, new = before.get(path), now.get(path)
        if old != new:
            told[path] = "new" if old is None else "gone" if new is None else "changed"
    return told
