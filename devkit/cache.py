"""The on-disk cache: where it is, and how one thing in it gets built exactly once.

Several processes may ask for the same thing at once (parallel CI jobs on one machine, two shells), and
any of them may be killed half-way. So every build holds a file lock, and only a stamp written last makes
its directory count. Things are built at their final path, not moved there: virtual environments and
byte code carry absolute paths inside.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STAMP = ".mmlane-stamp"


def cache_root() -> Path:
    """$MMLANE_CACHE, or ~/.cache/mmlane."""
    configured = os.environ.get("MMLANE_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "mmlane"
    return root.absolute()


def digest(*parts: str | bytes) -> str:
    """A short stable hash of what a cached thing is made from."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(str(len(data)).encode() + b":" + data)
    return sha.hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that belongs to `path`, across processes."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    name = str(path.relative_to(cache_root())).replace(os.sep, "--")
    with (locks / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_once(path: Path, made_from: str, build: Callable[[Path], None]) -> Path:
    """Return `path`, filled by `build(path)` unless it already is from the same ingredients."""
    stamp = path / _STAMP
    if _stamped(stamp, made_from):
        return path
    with locked(path):
        if _stamped(stamp, made_from):
            return path
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        build(path)
        stamp.write_text(made_from)
    return path


def _stamped(stamp: Path, made_from: str) -> bool:
    return stamp.is_file() and stamp.read_text() == made_from
