"""A watcher for the imports of named modules, and what a process does that cannot have mmlane.

Standard library only, and of that only what the interpreter has loaded already: see `mmlane.bootstrap`.
"""

# No `from __future__ import annotations`: it is a module too and would cost more than the rest. Hence the quotes.
import os
import sys
from _thread import get_ident  # built in, unlike threading

from mmlane import PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class ImportWatch:
    """A meta path finder that calls back around the import of a few named modules.

    It finds nothing itself. `before[name]` runs once, ahead of the module's body; `after[name]` runs once, when
    the body has run and before the importer continues, so that a later `from name import x` sees what the
    callback put there. Merely looking for a module (`importlib.util.find_spec`) calls none. An exception in a
    callback fails the import: callbacks that must not do so handle their own errors.
    """

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[ModuleType], None]] = {}
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders give for a watched module, else None."""
        search = (get_ident(), fullname)
        if search in self._searching or not (fullname in self.before or fullname in self.after):
            return None
        import importlib.util

        self._searching.add(search)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(search)
        if spec is not None and spec.loader is not None:
            self._surround(spec)
        return spec

    def _surround(self, spec: "ModuleSpec") -> None:
        # The loader stays the engine's own (inspect, runpy and resources ask it for more than exec_module);
        # only this one method is shadowed on the instance, and uncovered when it has run.
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            if module.__name__ != spec.name:
                return run(module)
            vars(loader).pop("exec_module", None)
            if before := self.before.pop(spec.name, None):
                before()
            run(module)
            if after := self.after.pop(spec.name, None):
                after(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


WATCH = ImportWatch()


def is_unstarted_child() -> bool:
    """Whether this is a spawned child whose `Process` object is still being unpickled."""
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and hasattr(processes.current_process(), "_inheriting")


def give_up(error: Exception, *, child: bool) -> None:
    """What follows, in one line, where mmlane cannot be had: the engine runs without it, also its children.

    In strict mode the process ends. So it does in a child, whose parent would have turned mmlane off had it not
    had it either: its peers would wait for this one in their collectives. The startup hook, mmlane.pth, does the
    same on its own where this file cannot be imported.
    """
    cause = f"{type(error).__name__}: {error}"
    if os.environ.get("MMLANE_STRICT", "").strip() == "1" or "--mmlane-strict" in sys.argv:
        raise SystemExit(f"{PREFIX}could not start: {cause}") from error
    if child:
        where = "in this process, whose peers may count on it"
        raise SystemExit(f"{PREFIX}could not start {where}: {cause}; start the engine anew") from error
    os.environ["MMLANE"] = "off"
    advice = "reinstall it with pip, or report this; MMLANE=off silences it"
    print(f"{PREFIX}is off, the engine runs without it: {cause}; {advice}", file=sys.stderr, flush=True)
