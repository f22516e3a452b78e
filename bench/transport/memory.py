"""What a peer has in memory, each page counted once.

Run in one of its processes: it may have a /dev/shm of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_BLOCK = 512  # of st_blocks, on every file system


def in_use(pids: Iterable[int]) -> int:
    """Bytes: files in /dev/shm and unnamed ones (memfd), mapped or not, and anonymous memory of these processes.

    Pss, because processes forked from one another share pages until one writes.
    """
    processes = [Path(f"/proc/{pid}") for pid in pids]
    anonymous = sum(_field(process / "smaps_rollup", "Pss_Anon") for process in processes)
    named = os.statvfs("/dev/shm")
    unnamed = {(found.st_dev, found.st_ino): found.st_blocks for found in _memfds(processes)}
    return anonymous + (named.f_blocks - named.f_bfree) * named.f_frsize + sum(unnamed.values()) * _BLOCK


def tidy() -> None:
    """Give back to the system what this process no longer uses, so that the next case does not find it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def available() -> int:
    """Bytes that can be had without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _memfds(processes: Iterable[Path]) -> Iterator[os.stat_result]:
    for process in processes:
        for descriptor in (process / "fd").iterdir():
            try:
                if str(descriptor.readlink()).startswith("/memfd:"):
                    yield descriptor.stat()
            except FileNotFoundError:  # closed meanwhile
                continue


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {name} in {path}")
