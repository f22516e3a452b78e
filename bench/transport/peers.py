"""The ways to move a tensor that are compared, and where each of them runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.releases import NEWEST
from bench.transport.cases import Case

MEMCPY = "memcpy"  # measured by every peer


@dataclass(frozen=True)
class Peer:
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
        puts, clones = case.n, case.n * case.readers
        match self.transport, self.mode, self.engine:
            case "lane", mode, _:
                copies = 1 + (clones if mode == "clone" else 0)
            case "engine", _, "0.5.9":
                # Rank 0 clones; then each rank has a request as tensors, as a pickle, and as it comes from gloo.
                copies = puts + clones + (4 * case.readers if case.readers > 1 else 1)
            case "engine", _, "0.5.12.post1":
                copies = puts + clones
            case "torch.multiprocessing", _, _:
                copies = 1
            case _:
                copies = puts
        return copies * case.nbytes

    def copied(self, case: Case) -> int | None:
        """Bytes copied for one case, in all processes together; None where that is not plain from the code."""
        puts, clones = case.n, case.n * case.readers
        match self.transport, self.mode, self.engine:
            case "lane", mode, _:
                copies = 1 + (clones if mode == "clone" else 0)
            case "engine", _, "0.5.9":
                if case.readers > 1:
                    return None  # through pickle, gloo and pickle again
                copies = 2 * puts + clones  # numpy's flatten copies before the copy
            case "engine", _, "0.5.12.post1":
                copies = puts + clones
            case "torch.multiprocessing", _, _:
                copies = 1
            case _:
                copies = puts
        return copies * case.nbytes


PEERS = (
    *(Peer("lane", "bench.transport.via_lane", mode=mode) for mode in ("view", "cow", "clone")),
    *(Peer("engine", "bench.transport.via_engine", engine=v) for v in ("0.5.9", "0.5.12.post1", NEWEST)),
    Peer("torch.multiprocessing", "bench.transport.via_torch", mode="file_system"),
    Peer("iceoryx2", "bench.transport.via_iceoryx"),
)


def chosen(names: list[str] | None) -> list[Peer]:
    """The peers with these labels or transports; all without any. Raises ValueError for a name that is neither."""
    if not names:
        return list(PEERS)
    unknown = [name for name in names if not any(name in (p.label, p.transport) for p in PEERS)]
    if unknown:
        known = ", ".join(repr(peer.label) for peer in PEERS)
        raise ValueError(f"no transport {unknown[0]!r}; there are {known}")
    return [peer for peer in PEERS if peer.label in names or peer.transport in names]
