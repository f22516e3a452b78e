"""What the .pth line runs in every interpreter: watch for the engine, cost nothing otherwise.

Standard library only, and of that only what the interpreter has loaded by itself. Nothing here may
raise: an exception in a .pth line would be printed by every Python process of the user's machine.
"""

# No `from __future__ import annotations`: it is a module too and would cost more than the rest. Hence the quotes.
import os
import sys
from _thread import get_ident  # built in, unlike threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

ENGINE = "sglang"


class ImportWatch:
    """A meta path finder that calls back around the import of a few named modules.

    It finds nothing itself. `before[name]` runs once, ahead of the module's body; `after[name]` runs once, when
    the body has run and before the importer continues, so that a later `from name import x` sees what the
    callback put there. Merely looking for a module (`importlib.util.find_spec`) calls nobody. An exception in a
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


def install() -> None:
    """Arrange for mmlane to start when this process first imports the engine. Idempotent.

    Does nothing when `MMLANE=off`, unless the command line carries a `--mmlane` flag, which must be taken
    off before the engine parses it.
    """
    if os.environ.get("MMLANE", "").strip().lower() == "off" and not _flagged():
        return
    if WATCH not in sys.meta_path and ENGINE not in sys.modules:
        WATCH.before[ENGINE] = _start
        sys.meta_path.insert(0, WATCH)


def _flagged() -> bool:
    return any(word.startswith("--mmlane") for word in getattr(sys, "argv", ()))


def _start() -> None:
    try:
        from mmlane import entry
    except ImportError as error:  # a dependency was not installed, or uninstalled; the engine is not to pay for it
        if os.environ.get("MMLANE_STRICT") == "1" or "--mmlane-strict" in sys.argv:
            raise SystemExit(f"mmlane: could not start: {error}") from error
        print(f"mmlane: is off, the engine runs without it: {error}; reinstall it with pip", file=sys.stderr)
        return
    entry.start("import hook")
