"""Calls back when a module's body has run, before its importer goes on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback` with the module of that name once it has been imported."""
    if not _callbacks:
        sys.meta_path.insert(0, _Imports())
    _callbacks.setdefault(name, []).append(callback)


class _Imports:
    """Meta path finder: finds nothing itself, and comes in when one of the modules has been run."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name not in _callbacks or name in self._searching:
            return None
        self._searching.add(name)  # because this asks the meta path too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for callback in _callbacks[name]:
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
