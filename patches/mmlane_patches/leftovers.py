"""Reclaims what a crashed engine left in /dev/shm: only what no living process can still want.

A segment on its way from tokenizer to schedulers is neither open nor mapped, and pids repeat: neither proves it
dead. All of this together does:

1. It is a plain file, ours, unreadable for others, with one name, of the form that engines give, on a tmpfs.
2. No process has it open or mapped, in any namespace: the kernel grants a write lease on it. The lease is held
   while the file is compared with what was looked at, and unlinked.
3. No process lives that made it or could have been sent its name; makers and receivers run as the same user.
   mmlane_PID_START_NAMESPACE_RANDOM of our own pid namespace: its maker is gone, by pid and start time; if another
   process has the pid now, that one is also younger than the segment. No rank waits for a dead tokenizer.
   sgl_shm_KIND_PID_RANDOM, and mmlane_ of another namespace: every process with torch in it is younger than the
   segment. The pid in the name may be that of any namespace, and means nothing.
   psm_RANDOM, Python's default, may be any program's: every process that runs Python is younger than the segment.
4. None of these is out of sight. /proc is of our own pid namespace and hides nothing. And as /dev/shm may be
   shared with other containers, which cannot be found out from inside, ours is the machine's first namespace, or
   the user says that no one else uses this /dev/shm (MMLANE_SWEEP=private). The first kind of name in 3 needs no
   such word: it says which namespace it is of.

What cannot be proven dead stays, and one line says why. Two things are not seen: a clock that was set forward
while a feature was on its way, and a name that a process has by fork from one that ended since (engines spawn).
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from mmlane import host
from mmlane_patches.verdicts import BY_HAND, IN_USE, Candidate, Verdicts


def reclaim(*, private: bool) -> tuple[list[Candidate], dict[str, list[Candidate]]]:
    """Unlink what is dead: what that was, and by reason what was left.

    private: whether to take the user's word that no other container uses this /dev/shm. Raises `OSError` where
    /dev/shm cannot be opened or listed.
    """
    reclaimed: list[Candidate] = []
    left: dict[str, list[Candidate]] = defaultdict(list)
    with ExitStack() as scope:
        directory = os.open(host.SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        scope.callback(os.close, directory)
        segments = _segments(directory)
        if segments and _may_begin(directory, scope):
            # Processes are looked at after the segments: a maker that is not found now is gone.
            verdicts = Verdicts(private)
            for segment in segments:
                why = _settle(segment, directory, verdicts)
                (left[why] if why else reclaimed).append(segment)
    left.pop(IN_USE, None)
    return reclaimed, left


def _may_begin(directory: int, scope: ExitStack) -> bool:
    """Take this user's lock until `scope` ends; False when another engine of this user sweeps, or just has.

    Two sweeps at the same time unlink nothing wrong. But each may keep the other from the lease on a segment that
    both have open, and the segment then stays until the next start. Only for this there is a lock. Where it cannot
    be had, the sweep goes on without it: no other user can prevent a sweep by the lock's name.
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


def _segments(directory: int) -> list[Candidate]:
    """The files that an engine of this user may have made."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if host.parse_segment_name(entry.name) is not None:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if _is_private(status):
                    found.append(Candidate.of(entry.name, status))
    return found


def _settle(segment: Candidate, directory: int, verdicts: Verdicts) -> str:
    """Unlink a dead segment; why not, otherwise."""
    try:
        with _leased(segment.name, directory) as status:
            if Candidate.of(segment.name, status) != segment:
                return IN_USE
            why = verdicts.why_wanted(segment)
            if not why:
                os.unlink(segment.name, dir_fd=directory)
            return why
    except (BlockingIOError, FileNotFoundError):
        return IN_USE
    except OSError as error:
        return f"{error.strerror}, so that nothing can be known of them; {BY_HAND}"


@contextmanager
def _leased(name: str, directory: int) -> Iterator[os.stat_result]:
    """Have a file to ourselves; `BlockingIOError` when a process has it open or mapped."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        # A process that opens it now waits, and the kernel tells us: not by SIGIO, which would end this process.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield os.fstat(file)
    finally:
        os.close(file)
