"""Reclaims what a crashed engine left in /dev/shm: only what nobody alive can still want.

A segment on its way from tokenizer to schedulers is neither open nor mapped, and pids repeat: neither proves it
dead. All of this together does:

1. It is a plain file, ours, unreadable for others, with one name, of the form that engines give, on a tmpfs.
2. Nobody has it open or mapped, in whatever namespace: the kernel grants a write lease on it. The lease is held
   while the file is compared with what was looked at, and unlinked.
3. Nobody lives who made it or could have been sent its name; makers and receivers run as the same user.
   mmlane_PID_START_NAMESPACE_RANDOM of our own pid namespace: its maker is gone, by pid and start time; if another
   process has the pid now, that one is also younger than the segment. Nobody waits for what a dead tokenizer sent.
   sgl_shm_KIND_PID_RANDOM, and mmlane_ of another namespace: every process with torch in it is younger than the
   segment. The pid in the name may be that of any namespace, and means nothing.
   psm_RANDOM, Python's default, is anybody's: every process that runs Python is younger than the segment.
4. Nobody of these is out of sight. /proc is of our own pid namespace and hides nothing. And as /dev/shm may be
   shared with other containers, which cannot be found out from inside, ours is the machine's first namespace, or
   the user says that nobody else uses this /dev/shm (MMLANE_SWEEP=private). The first kind of name in 3 needs no
   such word: it says which namespace it is of.

What cannot be proven dead stays, and one line says why. Two things are not seen: a clock that was set forward
while a feature was on its way, and a name that a process has by fork from one that ended since (engines spawn).
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

from mmlane import host, settings
from mmlane.host import SHM
from mmlane.log import guarded, say

NAMES = re.compile(r"psm_[0-9a-f]{8}|sgl_shm_[a-z]+_\d+_[0-9a-f]{8}|mmlane_(\d+)_(\d+)_(\d+)_[0-9a-f]{16}")
PROC = Path("/proc")
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's PROC_PID_INIT_INO
# File times and process start times are each up to a tick behind.
SLACK_S = 0.1

# Reasons to leave a segment. Of the first nothing is said.
IN_USE = "in use"
UNSEEN = (
    "an engine in another container may share it and want them; if none does, MMLANE_SWEEP=private reclaims them"
)
BY_HAND = "delete them by hand when no engine runs"


def before_launch(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Sweep before the engine starts its processes."""

    @wraps(original)
    def set_envs_and_config(server_args: Any) -> Any:
        sweep()
        return original(server_args)

    return set_envs_and_config


def sweep() -> None:
    """Reclaim what is provably dead, and say so. Never raises: whatever happens, the engine is to start."""
    with guarded("sweep", f"leftovers in {SHM} stay; MMLANE_SWEEP=0 silences this"):
        _sweep_and_say(settings.read(os.environ).sweep)


def _sweep_and_say(chosen: settings.Sweep) -> None:
    if chosen == "0":
        return
    reclaimed, left = _sweep(private=chosen == "private")
    if reclaimed:
        say(f"reclaimed {_amount(reclaimed)} that a crashed engine left in {SHM}; MMLANE_SWEEP=0 leaves them")
    for why, segments in left.items():
        say(f"left {_amount(segments)} in {SHM}, {segments[0].name} among them: {why}")


@dataclass(frozen=True)
class Segment:
    """One file in /dev/shm as it was when it was looked at; any change to it moves `changed` (nanoseconds)."""

    name: str
    inode: int
    changed: int
    bytes: int

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> Segment:
        return cls(name, status.st_ino, status.st_ctime_ns, status.st_blocks * 512)


def _amount(segments: list[Segment]) -> str:
    held = sum(segment.bytes for segment in segments)
    return f"{len(segments)} segment{'s' * (len(segments) > 1)} ({held / 2**20:.1f} MiB)"


def _sweep(private: bool) -> tuple[list[Segment], dict[str, list[Segment]]]:
    """What was unlinked, and by reason what was left."""
    reclaimed: list[Segment] = []
    left: dict[str, list[Segment]] = defaultdict(list)
    with ExitStack() as scope:
        directory = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        scope.callback(os.close, directory)
        segments = _segments(directory)
        if segments and _may_begin(directory, scope):
            # Processes are looked at after the segments: a maker that is not found now is gone.
            judge = Judge(private)
            for segment in segments:
                why = _settle(segment, directory, judge)
                (left[why] if why else reclaimed).append(segment)
    left.pop(IN_USE, None)
    return reclaimed, left


def _may_begin(directory: int, scope: ExitStack) -> bool:
    """Take this user's lock until `scope` ends; False when another engine of this user sweeps, or just has.

    Two sweeps at the same time unlink nothing wrong. But each may keep the other from the lease on a segment that
    both have open, and the segment then stays until the next start. Only for this there is a lock. Where it cannot
    be had, the sweep goes on without it: nobody else can prevent a sweep by the lock's name.
    """
    name = f"mmlane-sweep-{os.geteuid()}"
    flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(name, flags, 0o600, dir_fd=directory)
    except OSError:  # the name is another user's, or no file can be made here
        return True
    scope.callback(os.close, file)
    if not _is_private(os.fstat(file)):  # where fs.protected_regular lets us open another user's
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no lock can be had here
        return True
    if os.fstat(file).st_nlink == 0:  # the engine that had the lock removed the file after its sweep
        return False
    scope.callback(_remove, name, directory)
    return True


def _remove(name: str, directory: int) -> None:
    """Remove the lock's file while the lock is held. One that stays is empty, and serves the next sweep."""
    with suppress(OSError):
        os.unlink(name, dir_fd=directory)


def _is_private(status: os.stat_result) -> bool:
    """Whether it is a plain file of ours that no other user can open, and that has no second name."""
    plain = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
    return plain and status.st_uid == os.geteuid() and status.st_nlink <= 1


def _segments(directory: int) -> list[Segment]:
    """The files that an engine of this user may have made."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if NAMES.fullmatch(entry.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if _is_private(status):
                    found.append(Segment.of(entry.name, status))
    return found


def _settle(segment: Segment, directory: int, judge: Judge) -> str:
    """Unlink a dead segment; why not, otherwise."""
    try:
        with _leased(segment.name, directory) as status:
            if Segment.of(segment.name, status) != segment:
                return IN_USE
            why = judge.wanted(segment)
            if not why:
                os.unlink(segment.name, dir_fd=directory)
            return why
    except (BlockingIOError, FileNotFoundError):
        return IN_USE
    except OSError as error:
        return f"{error.strerror}, so that nothing can be known of them; {BY_HAND}"


@contextmanager
def _leased(name: str, directory: int) -> Iterator[os.stat_result]:
    """Have a file to ourselves; `BlockingIOError` when anybody has it open or mapped."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        # Who opens it meanwhile waits, and the kernel tells us: not by SIGIO, which would end this process.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield os.fstat(file)
    finally:
        os.close(file)


# --- who could still want it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """`started` is in clock ticks since boot, `born` the same by the clock that stamps files."""

    pid: int
    name: str
    started: int
    born: float

    def contains(self, what: bytes) -> bool:
        """Whether it has a file of such a name mapped; what cannot be looked into might."""
        try:
            return re.search(what, (PROC / str(self.pid) / "maps").read_bytes()) is not None
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return False
        except OSError:
            return True


class Judge:
    """Who lives, and whether that is everybody."""

    def __init__(self, private: bool) -> None:
        self.namespace = host.pid_namespace()
        self.hidden = _hidden()
        self.everywhere = private or self.namespace == FIRST_PID_NAMESPACE
        self.living = [] if self.hidden else sorted(_living(), key=lambda process: process.born)

    @cached_property
    def oldest_engine(self) -> Process | None:
        return next((process for process in self.living if process.contains(rb"/libtorch")), None)

    @cached_property
    def oldest_python(self) -> Process | None:
        return next((process for process in self.living if process.contains(rb"python|pypy")), None)

    def wanted(self, segment: Segment) -> str:
        """Why somebody may still want a segment that nobody has open; "" when it is dead."""
        if self.hidden:
            return f"{self.hidden}; {BY_HAND}"
        made = NAMES.fullmatch(segment.name)
        assert made is not None
        pid, started, namespace = (int(number or 0) for number in made.groups())
        if namespace == self.namespace and started:
            maker = next((process for process in self.living if process.pid == pid), None)
            gone = maker is None or (maker.started != started and _younger(maker, segment))
            return "" if gone else IN_USE
        if not self.everywhere:
            return UNSEEN
        oldest = self.oldest_python if segment.name.startswith("psm_") else self.oldest_engine
        if oldest is None or _younger(oldest, segment):
            return ""
        return f"process {oldest.pid} ({oldest.name}) is older than they are and may want them; {BY_HAND}"


def _younger(process: Process, segment: Segment) -> bool:
    return process.born > segment.changed / 1e9 + SLACK_S


def _hidden() -> str:
    """Why processes of our own pid namespace may be out of sight, or files not be as they look; "" when not."""
    kind, _ = _mounted(SHM)
    if kind != "tmpfs":
        return f"{SHM} is not a tmpfs" if kind else f"/proc/self/mountinfo does not tell what {SHM} is"
    _, options = _mounted(PROC)
    if re.search(r"\bhidepid=(?!0|off)", options):
        return "/proc hides processes (hidepid)"
    # One number for each namespace from that of /proc down to ours.
    if len(_field("NSpid", PROC / "self/status")) != 1:
        return "/proc is that of another pid namespace"
    return ""


def _mounted(path: Path) -> tuple[str, str]:
    """Kind and options of the file system at a path, which is mounted there or above; "" when that is not told."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mount = next((mount for mount in host.mounts() if mount.device == number), None)
    return (mount.kind, mount.options) if mount else ("", "")


def _living() -> Iterator[Process]:
    """Every process of this user in sight; also one that does not tell what it is, which may be as old as any."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    ticks = os.sysconf("SC_CLK_TCK")
    for entry in os.scandir(PROC):
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        process = host.process(pid)
        users = _field("Uid", Path(entry.path, "status"))
        if process is None or not users:
            if Path(entry.path).exists():  # else it has ended meanwhile
                yield Process(pid, "?", 0, 0.0)
        elif process.state not in "ZX" and os.geteuid() in users:
            yield Process(pid, process.name, process.started, booted + process.started / ticks)


def _field(name: str, file: Path) -> list[int]:
    """The numbers in a line of a /proc/PID/status; empty when they cannot be had."""
    try:
        found = re.search(rb"^%s:(.*)$" % name.encode(), file.read_bytes(), re.MULTILINE)
        return [int(word) for word in found[1].split()] if found else []
    except (OSError, ValueError):
        return []
