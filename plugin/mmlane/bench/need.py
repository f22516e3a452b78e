"""What the comparison takes of the machine's memory at most, for it to ask before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmlane import host
from mmlane.bench.case import Case
from mmlane.bench.sizes import MIB
from mmlane.bench.ways import Way

# Of a way's processes, as they are without a payload. A reader shares most pages with the process that forked it.
_WITH_ENGINE, _WITH_TORCH, _READER = 1200 * MIB, 400 * MIB, 150 * MIB


@dataclass(frozen=True)
class Need:
    """Bytes: what is taken at most, and what of that lies in /dev/shm."""

    memory: int
    shm: int


def need(ways: Sequence[Way], cases: Sequence[Case]) -> Need:
    """What the comparison takes at most: all processes are there at once, and one way at a time carries."""
    if not cases:
        return Need(0, 0)
    readers = max(case.readers for case in cases)
    processes = sum((_WITH_ENGINE if way.has_engine else _WITH_TORCH) + readers * _READER for way in ways)
    # Each has the payload and a plain copy of it.
    payloads = 2 * len(ways) * max(case.nbytes for case in cases)
    lanes = sum(way.keeps(case.nbytes) for way in ways for case in [max(cases, key=lambda case: case.nbytes)])
    carried = max(way.carries(case) for way in ways for case in cases)
    return Need(processes + payloads + lanes + carried, max(way.segments(case) for way in ways for case in cases))


def lacking(wanted: Need) -> str:
    """What there is too little of, in a clause; "" when it fits."""
    memory, (room, _) = host.memory(), host.room()
    if wanted.memory > memory.available:
        return f"{_mib(wanted.memory)} of memory are needed at most, and {_mib(memory.available)} are available"
    if wanted.shm > room:
        return f"{_mib(wanted.shm)} in {host.SHM} are needed at most, and {_mib(room)} are free there"
    return ""


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB"
