"""A lane's memory: a file without a name, sparse, which lives in memory only.

The kernel reports a lack of memory in three ways: as an error where memory is reserved beforehand, as SIGBUS
where it is first touched, and as the OOM killer where a control group is at its limit. Only the first can be
handled, so everything that will be written is reserved first (`Backing.reserve`), and never beyond what is left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
import weakref
from collections.abc import Callable

from mmlane import host
from mmlane.lane.errors import LaneUnavailable, needed
from mmlane.lane.libc import failure, libc
from mmlane.lane.mapping import Mapping

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_O_TMPFILE = getattr(os, "O_TMPFILE", 0)
# Numbers, and the C library: a Python that was built on an old one lacks the names, on a kernel that has the
# calls.
_MFD_CLOEXEC = 1
_MFD_ALLOW_SEALING = 2
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4
_GRANT = 64 << 20  # bytes to commit before looking again at what the machine has left
_TRUSTED = 0.1  # seconds after which to look again anyhow


class Grant:
    """A number of bytes that may be reserved, and that are granted once while this object lives.

    nbytes: what is left of it. So a put that is interrupted keeps nothing.
    """

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Backing:
    """A lane's memory: `nbytes` of address room in an anonymous file. Nothing is committed before `reserve`.

    Its descriptors are closed when the object dies.

    Attributes: `fd` (to write), `shared_fd` (what readers get), `degraded` (one line for each thing that this
    kernel or sandbox lacks). Raises LaneUnavailable when there is no way at all.
    """

    def __init__(self, nbytes: int) -> None:
        self.degraded: list[str] = []
        self._checked = 0.0  # when the machine was looked at last
        self._left = 0  # bytes that may be granted before it is looked at again
        self._grants: weakref.WeakSet[Grant] = weakref.WeakSet()
        self._on_file_system = False
        self.fd = self.shared_fd = -1
        self.fd = self.shared_fd = self._create()
        try:
            self._others = self._room() // 2  # bytes of a file system that are for its other users
            os.fchmod(self.fd, 0o600)  # a memfd is born with 0777
            os.ftruncate(self.fd, nbytes)
            self._seal()
            self.shared_fd = self._read_only()
        except (OSError, OverflowError) as error:  # the latter for more than the system can express
            self.close()
            raise LaneUnavailable(
                f"a lane of {nbytes} bytes could not be set up ({error}): ask for a smaller capacity,"
                " or raise `ulimit -f`"
            ) from error

    def _create(self) -> int:
        try:
            return _memfd()
        except OSError as error:
            self.degraded.append(
                f"memfd_create: {error}; an unnamed file in {host.SHM} serves, of which half is left free"
            )
        self._on_file_system = True
        try:
            return os.open(host.SHM, _O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LaneUnavailable(
                f"no shared memory without a name: {self.degraded[0].partition(';')[0]}, and O_TMPFILE in"
                f" {host.SHM}: {error}. Allow memfd_create in the sandbox, or raise `ulimit -n`"
            ) from error

    def _room(self) -> int:
        """Bytes that are free where the memory comes from, if that is a file system; else what no machine has."""
        if not self._on_file_system:
            return sys.maxsize
        room = os.fstatvfs(self.fd)
        return room.f_bavail * room.f_frsize

    def _seal(self) -> None:
        try:
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
        except OSError as error:
            self.degraded.append(f"F_ADD_SEALS: {error}; the memory file is not sealed against truncation")

    def _read_only(self) -> int:
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.degraded.append(f"read-only descriptor: {error}; readers could write to the memory")
            return self.fd

    def grant(self, nbytes: int) -> Grant:
        """Raises OSError(ENOMEM) unless that much memory may be reserved: at its limit a control group kills.

        Looks at the machine now and then only, which takes a quarter of a millisecond. For one thread at a time.
        """
        now = time.monotonic()
        if nbytes > self._left or now > self._checked + _TRUSTED:
            facts = host.memory()
            spare = min(min(facts.total, facts.limit or facts.total) // 16, 1 << 30)  # for everybody's other needs
            left = min(facts.available - spare, self._room() - self._others)
            left -= sum(grant.nbytes for grant in self._grants)
            if nbytes > left:
                raise OSError(
                    errno.ENOMEM,
                    f"{nbytes} bytes wanted, {max(left, 0)} left for the lane, of {facts.available} available",
                )
            self._checked, self._left = now, min(left, max(_GRANT, nbytes))
        self._left -= nbytes
        grant = Grant(nbytes)
        self._grants.add(grant)
        return grant

    def reserve(self, offset: int, nbytes: int) -> None:
        """Commit memory for a range, so that writing to it cannot fail. Raises OSError when there is none."""
        os.posix_fallocate(self.fd, offset, nbytes)

    def decommit(self, offset: int, nbytes: int) -> None:
        """Return a range's memory to the system; it reads as zeros until reserved again. Raises OSError."""
        if libc.fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes) != 0:
            raise failure()

    def close(self) -> None:
        """Close the descriptors; the memory goes when the last mapping does."""
        fds, self.fd, self.shared_fd = {self.fd, self.shared_fd}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.close()


def _memfd() -> int:
    create = getattr(libc, "memfd_create", None)
    if create is None:
        raise OSError(errno.ENOSYS, "not in this C library")
    fd: int = create(b"mmlane", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    if fd < 0:
        raise failure()
    return fd


def attempt(nbytes: int) -> None:
    """Make a lane's memory and let it go at once. Raises LaneUnavailable when there can be none of that size."""
    backing = Backing(nbytes)
    try:
        with needed("mmap"):
            Mapping(backing.fd, nbytes, writable=True).unmap()
    except OSError as error:
        raise LaneUnavailable(
            f"a lane of {nbytes} bytes could not be set up ({error}): ask for a smaller capacity,"
            " or raise `ulimit -v`"
        ) from error
    finally:
        backing.close()


def default_capacity() -> int:
    """What a lane may hold unless the user says otherwise, in bytes: address room, not committed."""
    return host.memory().lane_capacity()
