"""A lock file that no other user can take, empty or point elsewhere: for `ipc_lock`.

It lies in a directory of mode 0700 that is ours, below directories in which no other user can put another
in its place. The first process of an engine that decides tells its children by MMLANE_IPC_LOCK, so that all lock
one file even when a second look would find something else. Engines of one user may share it: it is held for the
time that a number is counted up.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmlane.log import say

VARIABLE = "MMLANE_IPC_LOCK"
NAME = "shm_wr_lock.lock"


class PrivateLock:
    """The path of a file in a directory of our own, looked at again, or made anew, whenever it is used.

    What cleans temporary directories may take it from a server that has been idle for days.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __fspath__(self) -> str:
        make_ours(self.file.parent)
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)


def in_its_place(engines: str) -> PrivateLock | str:
    """What takes the place of the engine's path: `engines` itself where no directory can be had."""
    inherited = os.environ.get(VARIABLE)
    if inherited == engines:
        return engines  # and it has been said
    problems = []
    if inherited:
        try:
            return _lock_in(Path(inherited).parent)
        except OSError as error:  # of another user, who started us; or no longer ours
            say(
                f"wanted the lock file of this engine's other processes, {inherited}, found that it cannot be "
                f"used ({error}); this one takes another, so with CUDA IPC the pool may fill up: start the "
                "engine anew"
            )
    for directory in candidates():
        try:
            lock = _lock_in(directory)
        except OSError as error:
            problems.append(str(error))
            continue
        os.environ[VARIABLE] = str(lock.file)
        return lock
    os.environ[VARIABLE] = engines
    say(
        f"wanted a directory that is ours alone for a lock file, found none ({'; '.join(problems)}); so with CUDA "
        f"IPC the engine locks {engines}, and other users of this machine can stop its requests, or empty a file "
        f"of yours by a link; set TMPDIR to a directory of yours, or silence this with MMLANE_DISABLE=ipc_lock"
    )
    return engines


def candidates() -> Iterator[Path]:
    """Where it may lie, the best place first.

    A runtime directory ends with the user's last session, and a home may be on a file system that cannot lock:
    both are better than none.
    """
    yield Path(tempfile.gettempdir()) / f"mmlane-{os.geteuid()}"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield Path(runtime) / "mmlane"
    cache = os.environ.get("MMLANE_CACHE")
    yield (Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache" / "mmlane") / "lock"  # noqa: PTH111


def _lock_in(directory: Path) -> PrivateLock:
    """Raises `OSError` when another user could get between us and that file."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    above = directory.parent.resolve()
    for parent in (above, *above.parents):
        _check_above(parent)
    make_ours(above / directory.name)
    return PrivateLock(above / directory.name / NAME)


def _check_above(parent: Path) -> None:
    found = parent.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{parent} is of user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others may move what is in {parent}")


def make_ours(directory: Path) -> None:
    """Make a directory, or make sure that it is a real one, ours, and closed to others. Raises `OSError`."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{directory} is no directory")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{directory} is of user {found.st_uid}")
    if found.st_mode & 0o077:
        raise PermissionError(f"{directory} is open to others (mode {stat.S_IMODE(found.st_mode):04o})")
