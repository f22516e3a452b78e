"""A second plugin that wants the engine's pointer for itself.

Its `Pointer` is the engine's own, of which it notes each that is made, in $NOTES/PID.theirs. It takes the place of
the engine's before mmlane comes; or, where the test has installed the plugin in $NOTES/installed, by the engine's
hooks, after that. The second rank opens a segment as late as it can: when a rank that has not waited for it has
removed the segment, or after a second.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "sglang.srt.managers.mm_utils"
NAME = "ShmPointerMMData"
LATE_S = 1.0
NOTES = Path(os.environ["NOTES"])
INSTALLED = NOTES / "installed"


def derive(engines: Any) -> Any:
    """The plugin's class, of this name in this module."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        engines.__init__(self, *args, **kwargs)
        with (NOTES / f"{os.getpid()}.theirs").open("a") as file:
            file.write(f"{self.shape}\n")

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        segment = Path("/dev/shm", state.get("shm_name", ""))
        until = time.monotonic() + LATE_S
        while "scheduler_TP1" in title() and segment.exists() and time.monotonic() < until:
            time.sleep(0.005)
        engines.__setstate__(self, state)

    body = {"__module__": __name__, "__init__": __init__, "__setstate__": __setstate__}
    globals()["Pointer"] = made = type("Pointer", (engines,), body)
    return made


def title() -> str:
    return Path("/proc/self/cmdline").read_text()


class First:
    """Meta path finder that is asked after mmlane's: when the engine's module has been run, it is the first."""

    def find_spec(self, name: str, path: Any = None, target: object = None) -> Any:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            made = derive(getattr(module, NAME))
            if not INSTALLED.exists():
                setattr(module, NAME, made)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """The engine calls this where the plugin is installed."""
    importlib.import_module(MODULE)  # the class is made with it
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(f"{MODULE}.{NAME}", globals()["Pointer"], hooks.HookType.REPLACE)


sys.path.append(str(INSTALLED))
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), First())
