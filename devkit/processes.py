"""Processes as /proc shows them: who belongs to a server, also after renaming and re-parenting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process; `title` is its command line, which engine processes overwrite with their role."""

    pid: int
    title: str


@dataclass(frozen=True)
class _Stat:
    pid: int
    parent: int
    session: int
    started: int


class Family:
    """A process that leads its own session, and whatever came from it.

    A member is found by its session or by its parent, and stays a member once seen, so that a process
    which leaves the session or loses its parent is still accounted for. Start times tell a member
    from another that got its number later.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._seen: dict[int, int] = {}

    def members(self) -> list[Process]:
        """Those that run now; zombies have already ended."""
        stats = {stat.pid: stat for stat in _all_stats()}
        known = {pid for pid, started in self._seen.items() if pid in stats and stats[pid].started == started}
        found = known | {stat.pid for stat in stats.values() if stat.session == self._leader}
        while more := {s.pid for s in stats.values() if s.parent in found} - found:
            found |= more
        self._seen = {pid: stats[pid].started for pid in found}
        return [Process(pid, title) for pid in sorted(found) if (title := _title(pid)) is not None]


def _all_stats() -> Iterator[_Stat]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # ended while we were looking
            continue
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = text.rpartition(")")[2].split()
        if fields[0] not in ("Z", "X"):
            yield _Stat(int(entry.name), int(fields[1]), int(fields[3]), int(fields[19]))


def _title(pid: int) -> str | None:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()
