"""Peak of the memory that a server's processes have, looked at again and again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.025
_BLOCK = 512  # of st_blocks, on every file system


@dataclass(frozen=True)
class Memory:
    """Bytes. `shared`: in the server's /dev/shm, and in memfds; `all`: anonymous memory as well."""

    shared: int
    all: int

    @classmethod
    def of(cls, pids: Iterable[int]) -> Memory:
        processes = [Path(f"/proc/{pid}") for pid in pids]
        memfds: dict[tuple[int, int], int] = {}
        shm = anonymous = 0
        for process in processes:
            try:
                anonymous += _rss_anon(process)
                named = os.statvfs(process / "root/dev/shm")  # the server's own, if it has one
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
        while not self._end.wait(EVERY_S):
            now = Memory.of(self._pids)
            self.found = Memory(max(self.found.shared, now.shared), max(self.found.all, now.all))


def faults(pid: int) -> int:
    """Minor page faults of a process so far; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _rss_anon(process: Path) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # of a zombie


def _memfds(process: Path) -> dict[tuple[int, int], int]:
    found = {}
    for descriptor in (process / "fd").iterdir():
        try:
            if str(descriptor.readlink()).startswith("/memfd:"):
                status = descriptor.stat()
                found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
        except FileNotFoundError:  # closed meanwhile
            continue
    return found
