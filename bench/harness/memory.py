"""What processes have in memory, and how much more there is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 512  # of st_blocks, on every file system
_EVERY_S = 0.025


@dataclass(frozen=True)
class Memory:
    """Bytes. `shared`: files in the processes' /dev/shm and unnamed ones (memfd), mapped or not; `all`: anonymous
    memory as well."""

    shared: int
    all: int

    @classmethod
    def of(cls, pids: Iterable[int], *, forked: bool = False) -> Memory:
        """What they have now. `forked`: pages that they share until one writes count once, which takes longer."""
        file, name = ("smaps_rollup", "Pss_Anon") if forked else ("status", "RssAnon")
        memfds: dict[tuple[int, int], int] = {}
        shm = anonymous = 0
        for process in (Path(f"/proc/{pid}") for pid in pids):
            try:
                anonymous += _field(process / file, name)
                named = os.statvfs(process / "root/dev/shm")  # they may have one of their own
                shm = max(shm, (named.f_blocks - named.f_bfree) * named.f_frsize)
                memfds.update(_memfds(process))
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended while we were looking
                continue
        shared = shm + sum(memfds.values())
        return cls(shared, shared + anonymous)


class Peak:
    """While inside, the largest `shared` and the largest `all`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.found = Memory(0, 0)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_EVERY_S):
            now = Memory.of(self._pids)
            self.found = Memory(max(self.found.shared, now.shared), max(self.found.all, now.all))


def faults(pid: int) -> int:
    """Minor page faults of a process so far; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def available() -> int:
    """Bytes that can be had without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0  # as of a zombie


def _memfds(process: Path) -> dict[tuple[int, int], int]:
    found = {}
    for descriptor in (process / "fd").iterdir():
        try:
            if str(descriptor.readlink()).startswith("/memfd:"):
                status = descriptor.stat()
                found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
        except FileNotFoundError:  # closed since the directory was listed
            continue
    return found
