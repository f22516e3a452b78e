"""A directory of mode 0700 that is ours, below others in which no other user can put one in its place."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


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


def checked(directory: Path) -> Path:
    """That directory, made if it is not there. Raises `OSError` when another user could get between us and it."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    above = directory.parent.resolve()
    for parent in (above, *above.parents):
        _check_above(parent)
    make_ours(above / directory.name)
    return above / directory.name


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
