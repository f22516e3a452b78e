"""/dev/shm: the room in it, and the segments that engines and Python programs have there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmlane.host import proc
from mmlane.host.segment_names import Kind, kind_of, parse_segment_name

SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Segment:
    """One file in /dev/shm that carries features. `bytes` is the memory that it holds.

    `pid` is the maker's, where the name tells it; `alive` says whether the maker runs, None where that cannot be
    known. The engine's names tell no more than the pid, so there `alive` means that some process has that number
    in this pid namespace; ours tell the maker for certain.
    """

    name: str
    kind: Kind
    bytes: int
    pid: int | None
    alive: bool | None


@dataclass(frozen=True)
class SharedMemory:
    """A /dev/shm: its size and what is free in it, in bytes, and the segments that are in it."""

    path: Path
    total: int
    free: int
    writable: bool
    read_only: bool
    segments: tuple[Segment, ...]

    def abandoned(self) -> tuple[Segment, ...]:
        """The segments whose maker is gone."""
        return tuple(segment for segment in self.segments if segment.alive is False)


def shared_memory(path: Path = SHM) -> SharedMemory | None:
    """The machine's /dev/shm as it is now; None when there is none. Without segments where it cannot be listed.

    read_only: whether it is mounted so. writable: whether this user may make files there, by their permissions.
    """
    try:
        files, system = _files(path), os.statvfs(path)
    except OSError:
        return None
    return SharedMemory(
        path=path,
        total=system.f_frsize * system.f_blocks,
        free=system.f_frsize * system.f_bavail,
        writable=os.access(path, os.W_OK | os.X_OK),
        read_only=bool(system.f_flag & os.ST_RDONLY),
        segments=tuple(_segments(files)),
    )


def room(path: Path = SHM) -> tuple[int, int]:
    """What is free in a /dev/shm and its size, in bytes; both 0 where that cannot be had."""
    try:
        system = os.statvfs(path)
    except OSError:
        return 0, 0
    return system.f_frsize * system.f_bavail, system.f_frsize * system.f_blocks


def _files(path: Path) -> list[Path]:
    """What is in a directory; nothing where this user may not list it. Raises `OSError` where there is none."""
    try:
        return sorted(path.iterdir())
    except PermissionError:
        return []


def _segments(files: list[Path]) -> Iterator[Segment]:
    for file in files:
        kind = kind_of(file.name)
        if kind is None:
            continue
        try:
            found = file.lstat()  # any user can put a link there, to anything or nothing
        except OSError:  # unlinked while we were looking
            continue
        if stat.S_ISREG(found.st_mode):
            yield Segment(file.name, kind, found.st_blocks * 512, *maker(file.name))


def maker(name: str) -> tuple[int | None, bool | None]:
    """Who made a segment: the pid, and whether that process runs; None for what its name does not tell."""
    parsed = parse_segment_name(name)
    if parsed is None or parsed.pid is None:
        return None, None
    if parsed.kind == "engine":
        return parsed.pid, proc.is_alive(parsed.pid)
    if parsed.namespace != proc.pid_namespace():
        return parsed.pid, None
    holder = proc.process(parsed.pid)
    return parsed.pid, proc.is_alive(parsed.pid) and (holder is None or holder.started == parsed.started)
