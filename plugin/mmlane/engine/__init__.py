"""Facts about the installed engine and about this process. The only module that asks for the engine's version."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import multiprocessing.process
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from packaging.version import InvalidVersion, Version

from mmlane.engine.source import EngineSource
from mmlane.import_hook import is_unstarted_child

DISTRIBUTION = "sglang"
PACKAGE = "sglang"
UNKNOWN = Version("0")

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

    @property
    def version_known(self) -> bool:
        """Whether the version says anything: a checkout without tags calls itself 0.0.0.dev0 or 0.1.dev1."""
        return self.version >= Version("0.1")

    @cached_property
    def source(self) -> EngineSource | None:
        return EngineSource(self.root) if self.root is not None else None


def installed() -> Engine | None:
    """The engine that this interpreter would import, found without importing it; None when there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return Engine(_version(root), root)


def _version(root: Path) -> Version:
    """The version of the engine in `root`, from what lies nearest to it; UNKNOWN when nothing tells."""
    beside = (d.version for d in importlib.metadata.distributions(name=DISTRIBUTION, path=[str(root)]))
    anywhere = (d.version for d in importlib.metadata.distributions(name=DISTRIBUTION))
    for text in chain(beside, _written_version(root), anywhere):
        try:
            return Version(text)
        except InvalidVersion:
            continue
    return UNKNOWN


def _written_version(root: Path) -> Iterator[str]:
    """What setuptools_scm wrote into the package when it was built."""
    file = root / PACKAGE / "_version.py"
    if file.is_file():
        yield from re.findall(r"""^__version__\s*=.*?['"]([^'"]+)['"]""", file.read_text(encoding="utf-8"), re.M)


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


def is_child() -> bool:
    """Whether the engine has started this process, so that it is one of several that have to decide the same."""
    return is_unstarted_child() or role() in ROLES.values()


def when_child_runs(callback: Callable[[], None]) -> None:
    """In an unstarted child: call back once, when its `Process` object is there and about to run its target."""
    process = multiprocessing.process.BaseProcess
    run = process.run

    def run_after_callback(self: multiprocessing.process.BaseProcess) -> None:
        process.run = run  # type: ignore[method-assign]
        callback()
        run(self)

    process.run = run_after_callback  # type: ignore[method-assign]
