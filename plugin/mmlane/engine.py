"""Facts about the installed engine and about this process. The only module that asks for the engine's version."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import multiprocessing.process
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.version import InvalidVersion, Version

from mmlane.patching import EngineSource

DISTRIBUTION = "sglang"
PACKAGE = "sglang"

# The functions by which the engine starts its processes, and what we call those processes.
ROLES = {
    "run_scheduler_process": "scheduler",
    "run_data_parallel_controller_process": "dp_controller",
    "run_detokenizer_process": "detokenizer",
    "run_multi_detokenizer_router_process": "detokenizer",
    "subprocess_started": "tokenizer",  # uvicorn's workers are the engine's tokenizer workers
}


@dataclass(frozen=True)
class Engine:
    """One SGLang release: its version, and the directory that holds the package `sglang`, if there is one."""

    version: Version
    root: Path | None

    @cached_property
    def source(self) -> EngineSource | None:
        return EngineSource(self.root) if self.root is not None else None


def installed() -> Engine | None:
    """The engine that this interpreter would import, found without importing it; None when there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    try:
        version = Version(importlib.metadata.version(DISTRIBUTION))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        version = Version("0")  # a source tree without metadata: every patch will say what it could not tell
    return Engine(version, root)


def role() -> str:
    """What this process is in the engine: main, tokenizer, scheduler, dp_controller, detokenizer, or other.

    In a spawned child the answer is known from the moment `multiprocessing` runs its target.
    """
    process = multiprocessing.current_process()
    if multiprocessing.parent_process() is None:
        return "main"
    target = getattr(process, "_target", None)
    while isinstance(target, functools.partial):
        target = target.func
    name = getattr(target, "__name__", "other")
    return ROLES.get(name, name)


def is_unstarted_child() -> bool:
    """Whether this is a spawned child whose `Process` object is still being unpickled."""
    return getattr(multiprocessing.current_process(), "_inheriting", False) is True


def when_child_runs(callback: Callable[[], None]) -> None:
    """In an unstarted child: call back once, when its `Process` object is there and about to run its target."""
    process = multiprocessing.process.BaseProcess
    run = process.run

    def run_after_callback(self: multiprocessing.process.BaseProcess) -> None:
        process.run = run  # type: ignore[method-assign]
        callback()
        run(self)

    process.run = run_after_callback  # type: ignore[method-assign]
