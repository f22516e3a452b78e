"""The ways to move a tensor that are compared, and where each of them runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.releases import NEWEST
from mmlane.bench.case import Case

MEMCPY = "memcpy"  # measured by every way
LATEST = f"engine {NEWEST}"


@dataclass(frozen=True)
class Way:
    """A transport; `mode` and `engine` tell those of one kind apart."""

    transport: str
    module: str
    mode: str | None = None
    engine: str | None = None

    @property
    def label(self) -> str:
        """As on the command line, in tables and plots."""
        if self.transport == "torch.multiprocessing":
            return self.transport
        return " ".join(part for part in (self.transport, self.engine, self.mode) if part)

    def python(self) -> Path:
        """The interpreter of the environment that has it, which is made if need be."""
        if self.engine is None:
            return Path(sys.executable)
        from devkit.environment import engine_environment

        return engine_environment(self.engine).python

    def needs(self, case: Case) -> int:
        """About how many bytes it takes at its worst, beside the source and the plain copy of it."""
        copies = self._copies(case)
        if self.engine == "0.5.9":
            # Rank 0 clones; then each rank has a request as tensors, as a pickle, and as it comes from gloo.
            copies += 4 * case.readers if case.readers > 1 else 1
        return copies * case.nbytes

    def copied(self, case: Case) -> int | None:
        """Bytes copied for one case, in all processes together; None where that is not plain from the code."""
        copies = self._copies(case)
        if self.engine == "0.5.9":
            if case.readers > 1:
                return None  # through pickle, gloo and pickle again
            copies += case.n  # numpy's flatten copies before the copy
        return copies * case.nbytes

    def _copies(self, case: Case) -> int:
        puts, clones = case.n, case.n * case.readers
        match self.transport, self.mode, self.engine:
            case "lane", "clone", _:
                return 1 + clones
            case "lane" | "torch.multiprocessing", _, _:
                return 1
            case "engine", _, "0.5.9" | "0.5.12.post1":
                return puts + clones
            case _:
                return puts


WAYS = (
    *(Way("lane", "mmlane.bench.via_lane", mode=mode) for mode in ("view", "cow", "clone")),
    *(Way("engine", "mmlane.bench.via_engine", engine=v) for v in ("0.5.9", "0.5.12.post1", NEWEST)),
    Way("torch.multiprocessing", "bench.transport.via_torch", mode="file_system"),
    Way("iceoryx2", "bench.transport.via_iceoryx"),
)


def chosen(names: list[str] | None) -> list[Way]:
    """The ways with these labels or transports; all without any. Raises ValueError for a name that is neither."""
    if not names:
        return list(WAYS)
    unknown = [name for name in names if not any(name in (way.label, way.transport) for way in WAYS)]
    if unknown:
        known = ", ".join(repr(way.label) for way in WAYS)
        raise ValueError(f"no transport {unknown[0]!r}; there are {known}")
    return [way for way in WAYS if way.label in names or way.transport in names]
