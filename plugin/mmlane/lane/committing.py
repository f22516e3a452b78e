"""The memory behind a lane: committed where it is needed, and a bit ahead; decommitted where it is idle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

from mmlane.lane import failpoints
from mmlane.lane.agenda import Agenda
from mmlane.lane.allocator import Allocator
from mmlane.lane.guard import Guard
from mmlane.lane.lifecycle import Lifecycle
from mmlane.lane.mapping import Mapping
from mmlane.lane.memory import Backing

_AHEAD = 8 << 20  # bytes at most to commit ahead of need
_EARLY = 256 << 20  # bytes at most to commit as soon as the lane is open


class Memory(NamedTuple):
    """A lane's memory, and the producer's mapping of it. It goes with the last thread that uses it."""

    backing: Backing
    mapping: Mapping


class Committer:
    """Says to the allocator which segments have memory, and sees to it that it is so.

    base: where extents begin in the memory. `commit` and `decommit` are called without the lane's lock: they do
    each segment under a lock of their own, and tell the allocator under the lane's inside of it. The other
    methods are called with the lane's lock held.

    Attributes: `memory`, None once the lane has ended. `degraded`: what this kernel or sandbox lacks.
    `never_decommits`: it cannot be done here. `starved`: memory could not be had; it is not asked for ahead of
    need until the next look. `early`: bytes of the largest put that came before the lane was open, to have ready
    when it is.
    """

    def __init__(
        self,
        name: str,
        memory: Memory,
        base: int,
        allocator: Allocator,
        lifecycle: Lifecycle,
        guard: Guard,
        agenda: Agenda,
    ) -> None:
        self.memory: Memory | None = memory
        self.base = base
        self.allocator = allocator
        self.degraded = memory.backing.degraded
        self.never_decommits = self.starved = False
        self.committing = threading.Lock()
        self._name = name
        self._lifecycle = lifecycle
        self._guard = guard
        self._agenda = agenda
        self.early = 0
        self._ahead = 0  # bytes to have ready for the next put, as large as the largest since the last look

    def expect(self, nbytes: int) -> None:
        """There was a put of this size: have as much ready for the next."""
        self._ahead = max(self._ahead, min(nbytes, _AHEAD))

    def came_early(self, nbytes: int) -> None:
        """A put of this size came before the lane was open: have as much ready when it is."""
        self.early = max(self.early, min(nbytes, _EARLY))

    def expect_nothing(self) -> None:
        """A look: what was expected, and what could not be had, was long ago."""
        self.starved = False
        self._ahead = 0

    def ahead(self) -> list[tuple[int, int]]:
        """The ranges of whole segments to commit ahead of need."""
        nbytes = max(self._ahead, self.early if self._lifecycle.has_opened else 0)
        return self.allocator.place(nbytes)[1] if nbytes and not self.starved else []

    def idle(self) -> list[int]:
        """Offsets of the segments to decommit."""
        return [] if self.never_decommits else self.allocator.idle()

    def commit(self, memory: Memory, ranges: Sequence[tuple[int, int]]) -> None:
        """Have memory behind ranges of whole segments. Raises OSError when there is none to be had."""
        allocator, backing = self.allocator, memory.backing
        if not ranges:
            return
        with self.committing:
            grant = backing.grant(sum(size for _, size in ranges))  # for all of it, or none is committed
        for start, size in ranges:
            for at in range(start, start + size, allocator.segment):
                # One segment at a time, and one thread: a put that needs one waits for one at most, and a
                # reservation that fails takes back pages of its range that another thread may rely on.
                with self.committing:
                    grant.nbytes -= allocator.segment
                    if allocator.is_committed(at):
                        continue
                    backing.reserve(self.base + at, allocator.segment)
                    failpoints.reached("commit.reserved")
                    with self._guard.lock, self._guard:
                        allocator.note_committed(at, allocator.segment)
                        self._agenda.watch()
            memory.mapping.populate(self.base + start, size)
            failpoints.reached("commit.populated")

    def decommit(self, segments: Sequence[int]) -> None:
        """Return the memory of idle segments to the system. Readers have nothing there, and need not be asked."""
        allocator, memory = self.allocator, self.memory
        for at in segments:
            with self.committing:
                with self._guard.lock, self._guard:
                    if self._lifecycle.closed or memory is None:
                        return
                    if not allocator.is_free(at, allocator.segment):  # any more
                        continue
                    allocator.note_decommitted(at, allocator.segment)  # a put that wants it waits for us
                try:
                    memory.backing.decommit(self.base + at, allocator.segment)
                except OSError as error:
                    self.never_decommits = True
                    self.degraded.append(
                        f"hole punching: {error}; memory that was committed is kept until the lane ends"
                    )
                    self._agenda.log(logging.WARNING, "lane %s goes without %s", self._name, self.degraded[-1])
                    with self._guard.lock, self._guard:
                        allocator.note_committed(at, allocator.segment)
                    return
            failpoints.reached("decommit.punched")
