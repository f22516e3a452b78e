"""Which processes may still want a segment that none has open: points 3 and 4 of the rule in `leftovers`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mmlane import host

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's PROC_PID_INIT_INO
# File times and process start times are each up to a tick behind.
SLACK_S = 0.1

# Reasons to leave a segment. Of the first nothing is said.
IN_USE = "in use"
UNSEEN = (
    "an engine in another container may share it and want them; if none does, MMLANE_SWEEP=private reclaims them"
)
BY_HAND = "delete them by hand when no engine runs"


@dataclass(frozen=True)
class Candidate:
    """One file in /dev/shm as it was when it was looked at; any change to it moves `changed` (nanoseconds)."""

    name: str
    inode: int
    changed: int
    bytes: int

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> Candidate:
        return cls(name, status.st_ino, status.st_ctime_ns, status.st_blocks * 512)


@dataclass(frozen=True)
class RunningProcess:
    """`started` is in clock ticks since boot, `born` the same by the clock that stamps files."""

    pid: int
    name: str
    started: int
    born: float

    def may_have_mapped(self, name: bytes) -> bool:
        """Whether it has a file of such a name mapped; what cannot be looked into might."""
        return host.has_mapped(self.pid, name) is not False


class Verdicts:
    """Which processes live, and whether all can be seen: what to know before a segment is called dead."""

    def __init__(self, private: bool) -> None:
        self.namespace = host.pid_namespace()
        self.everywhere = private or self.namespace == FIRST_PID_NAMESPACE
        self.hidden = _hidden()
        self.living: list[RunningProcess] = []
        if not self.hidden:
            pids = host.pids()
            self.hidden = "/proc cannot be listed" if pids is None else ""
            self.living = sorted(_living(pids or []), key=lambda process: process.born)

    @cached_property
    def oldest_engine(self) -> RunningProcess | None:
        return next((process for process in self.living if process.may_have_mapped(rb"/libtorch")), None)

    @cached_property
    def oldest_python(self) -> RunningProcess | None:
        return next((process for process in self.living if process.may_have_mapped(rb"python|pypy")), None)

    def why_wanted(self, segment: Candidate) -> str:
        """Why a process may still want a segment that none has open; "" when it is dead."""
        if self.hidden:
            return f"{self.hidden}; {BY_HAND}"
        parsed = host.parse_segment_name(segment.name)
        assert parsed is not None
        if parsed.namespace == self.namespace and parsed.started:
            maker = next((process for process in self.living if process.pid == parsed.pid), None)
            gone = maker is None or (maker.started != parsed.started and _younger(maker, segment))
            return "" if gone else IN_USE
        if not self.everywhere:
            return UNSEEN
        oldest = self.oldest_python if parsed.kind == "python" else self.oldest_engine
        if oldest is None or _younger(oldest, segment):
            return ""
        return f"process {oldest.pid} ({oldest.name}) is older than they are and may want them; {BY_HAND}"


def _younger(process: RunningProcess, segment: Candidate) -> bool:
    return process.born > segment.changed / 1e9 + SLACK_S


def _hidden() -> str:
    """Why processes of our own pid namespace may be out of sight, or files not be as they look; "" when not."""
    shm, proc = host.mount_of(host.SHM), host.mount_of(host.PROC)
    if shm is None or not shm.kind:
        return f"/proc/self/mountinfo does not tell what {host.SHM} is"
    if shm.kind != "tmpfs":
        return f"{host.SHM} is not a tmpfs"
    if proc is not None and re.search(r"\bhidepid=(?!0|off)", proc.options):
        return "/proc hides processes (hidepid)"
    # One number for each namespace from that of /proc down to ours.
    if len(host.status_numbers("self", "NSpid")) != 1:
        return "/proc is that of another pid namespace"
    return ""


def _living(pids: list[int]) -> Iterator[RunningProcess]:
    """Those of this user; also one that does not tell what it is, which may be as old as any."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    ticks = os.sysconf("SC_CLK_TCK")
    for pid in pids:
        process, users = host.process(pid), host.status_numbers(pid, "Uid")
        if process is None or not users:
            if host.is_alive(pid):  # else it has just ended
                yield RunningProcess(pid, "?", 0, 0.0)
        elif process.state not in "ZX" and os.geteuid() in users:
            yield RunningProcess(pid, process.name, process.started, booted + process.started / ticks)
