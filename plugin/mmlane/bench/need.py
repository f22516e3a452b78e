"""What the comparison takes of the machine's memory at most, for it to ask before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmlane import host
from mmlane.bench.case import Case
from mmlane.bench.sizes import MIB
from mmlane.bench.ways import Way

# Of a way's processes, as they are without a payload. A reader shares most pages with the process that forked it,
# but for what CUDA takes.
_WITH_ENGINE, _WITH_TORCH, _READER, _ON_CUDA = 1000 * MIB, 400 * MIB, 100 * MIB, 800 * MIB


@dataclass(frozen=True)
class Need:
    """Bytes: what is taken at most, and what of that lies in /dev/shm."""

    memory: int
    shm: int


def need(plan: Sequence[tuple[Case, Sequence[Way]]]) -> Need:
    """What the comparison takes at most: all processes are there at once, and one way at a time carries."""
    largest = max(case.nbytes for case, _ in plan)
    readers = max(case.readers for case, _ in plan)
    ways = {way for _, ways in plan for way in ways}
    processes = sum(
        (_WITH_ENGINE if way.has_engine else _WITH_TORCH)
        + readers * (_READER if way.device == "cpu" else _ON_CUDA)
        for way in ways
    )
    payloads = 2 * largest * max(len(ways) for _, ways in plan)  # and a plain copy of each
    lanes = sum(way.keeps(largest) for way in ways)
    carried = max(way.carries(case) for case, ways in plan for way in ways)
    in_shm = max(way.segments(case) for case, ways in plan for way in ways)
    return Need(processes + payloads + lanes + carried, in_shm)


def lacking(wanted: Need) -> str:
    """What there is too little of, in a clause; "" when it fits."""
    memory, (room, _) = host.memory(), host.room()
    if wanted.memory > memory.available:
        return f"{_mib(wanted.memory)} of memory are needed at most, and {_mib(memory.available)} are available"
    if wanted.shm > room:
        return f"{_mib(wanted.shm)} in {host.SHM} are needed at most, and {_mib(room)} are free there"
    return ""


def _mib(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB"
