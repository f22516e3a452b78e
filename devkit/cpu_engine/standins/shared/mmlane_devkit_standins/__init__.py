"""Names without behaviour: enough for `from compiled_package import kernel`, and no more.

Before 0.5.11 the engine imports compiled CUDA kernels by name at module level. On the CPU path none of
them is called. Should one ever be, it raises and says which: a wrong path must not pass for a result.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn


class StandIn:
    """A name of a compiled package: has attributes, can be annotated with, cannot be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} was called; it is only a stand-in on this machine")


class StandInModule(ModuleType):
    """A module in which every public name exists."""

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def stand_in_for(package: str) -> None:
    """Make the package that is being imported, and everything below it, a stand-in."""
    sys.modules[package].__class__ = StandInModule
    sys.meta_path.append(_Submodules(package))
