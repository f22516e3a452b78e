"""Shared memory without a name: a sparse file that lives in memory only, and mappings of it.

The kernel reports a lack of memory in three ways: as an error where memory is reserved beforehand, as SIGBUS
where it is first touched, and as the OOM killer where a control group is at its limit. Only the first can be
handled, so everything that will be written is reserved first (`Backing.reserve`), and never beyond what is left.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import ClassVar

import torch

from mmlane import host
from mmlane.lane.errors import LaneUnavailable, needed

PAGE = mmap.PAGESIZE

_MADV_DONTDUMP = 16
_MADV_POPULATE_WRITE = 23  # Python names it from 3.14 on
_MAP_NORESERVE = 0x4000
_SMALL = 1 << 20  # bytes below which torch's machinery costs more than the copy, and its threads bring nothing
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_O_TMPFILE = getattr(os, "O_TMPFILE", 0)
_MAP_FAILED = ctypes.c_void_p(-1).value
# Numbers, and the C library: a Python that was built on an old one lacks the names, on a kernel that has the
# calls.
_MFD_CLOEXEC = 1
_MFD_ALLOW_SEALING = 2
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4
_GRANT = 64 << 20  # bytes to commit before looking again at what the machine has left
_TRUSTED = 0.1  # seconds after which to look again anyhow
_PRIVATE_SHARE = 4  # private mappings take so much of a process's mappings: one part in this many
_MAX_MAP_COUNT = 65530  # the kernel's own default

# ctypes, since Python's own mmap gives no address of a read-only mapping and holds the GIL in madvise and munmap.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Owner(ctypes.c_ubyte * (1 << 46)):  # type: ignore[misc]
    """Points at a place in a mapping, for a tensor's storage to hold. What it `keeps` lives as long as that.

    One type for any length: ctypes makes a type per array length, and types are only freed by the garbage
    collector. It allocates nothing; the code that reads through it says how many bytes.
    """

    keeps: object = None


def _fail() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@cache
def _max_private() -> int:
    return (host.max_map_count() or _MAX_MAP_COUNT) // _PRIVATE_SHARE


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """`nbytes` rounded up to a multiple of `unit`."""
    return -(-nbytes // unit) * unit


class Mapping:
    """A file's bytes in this process's address space, unmapped when the object dies.

    At the end of the interpreter it stays: tensors may still look at it, and the kernel unmaps it. It is in no
    core dump: that would read, and so commit, all of a sparse file.

    writable: the producer's way, changes are everybody's. private: an edit is seen by nobody else and costs a
    page. Neither: an edit ends the process with SIGSEGV.

    Raises OSError when the kernel does not map it (ENOMEM: address space, or too many mappings).
    """

    private = False
    _private: ClassVar[dict[int, None]] = {}  # addresses of this process's private mappings
    _mapped: ClassVar[dict[weakref.ref[Mapping], tuple[list[int], int]]] = {}  # where each lies, and its size
    _dead: ClassVar[deque[weakref.ref[Mapping]]] = deque()  # not all of them are unmapped: it was interrupted

    def __init__(
        self, fd: int, nbytes: int, *, offset: int = 0, writable: bool = False, private: bool = False
    ) -> None:
        self.nbytes = nbytes
        self._places: list[int] = []  # one, or none
        unmap_dead()
        if private:
            self._check_count()
        self._note = weakref.ref(self, self._dead.append)
        self._mapped[self._note] = self._places, nbytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable or private else 0)
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
        # In C as a whole, so that no signal handler can come between the mapping and its note.
        self._places.extend(map(_libc.mmap, (None,), (nbytes,), (protection,), (flags,), (fd,), (offset,)))
        if self._places == [_MAP_FAILED]:
            self._places.clear()
            raise _fail()
        if private:
            self.private = True
            self._private[self.address] = None
        _libc.madvise(self.address, nbytes, _MADV_DONTDUMP)

    @property
    def address(self) -> int:
        """Where it lies; 0 once it is unmapped."""
        return self._places[0] if self._places else 0

    def _check_count(self) -> None:
        """Raises OSError where one more private mapping would take what the process needs for itself."""
        if len(self._private) >= _max_private():
            raise OSError(errno.ENOMEM, f"{len(self._private)} private mappings, a quarter of vm.max_map_count")

    def owner(self, offset: int = 0, keeps: object = None) -> Owner:
        """An object at a place in the mapping, for a storage to hold. It does not keep the mapping."""
        owner: Owner = Owner.from_address(self.address + offset)
        if keeps is not None:
            owner.keeps = keeps
        return owner

    def words(self, count: int) -> ctypes.Array[ctypes.c_uint64]:
        """The first `count` unsigned 64-bit numbers. Valid while the mapping is."""
        return (ctypes.c_uint64 * count).from_address(self.address)

    def populate(self, offset: int, nbytes: int) -> bool:
        """Fill pages and page tables now, without the GIL; False where the kernel does not know how."""
        return bool(_libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_WRITE) == 0)

    def protect(self) -> None:
        """From now on it is read-only. Raises OSError."""
        if _libc.mprotect(self.address, self.nbytes, mmap.PROT_READ) != 0:
            raise _fail()

    def unmap(self) -> None:
        """Let the range go. Whatever still looks at it would crash: only for who knows that nothing does."""
        if self._places:
            _unmap(self._places, self.nbytes)
        self._mapped.pop(self._note, None)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending() and hasattr(self, "_note"):
            self.unmap()


def _unmap(places: list[int], nbytes: int) -> None:
    Mapping._private.pop(places[0], None)  # before the next mapping can have it
    next(map(_libc.munmap, iter(places.pop, None), (nbytes,)))  # in C as a whole, as above


def unmap_dead() -> None:
    """Unmap what has died without it, since a signal handler raised in its finalizer."""
    while Mapping._dead:
        try:
            note = Mapping._dead.popleft()
        except IndexError:  # another thread has it
            return
        places, nbytes = Mapping._mapped.pop(note, ([], 0))
        if places:
            _unmap(places, nbytes)


class Descriptor:
    """A file descriptor, closed when the object dies: whoever may still use the number holds the object.

    What is open at the end of the interpreter, the kernel closes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(
        self, ending: Callable[[], bool] = sys.is_finalizing, close: Callable[[int], None] = os.close
    ) -> None:
        if not ending() and hasattr(self, "fd"):
            close(self.fd)


def tensor_at(owner: Owner, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor over what `owner` points to; its storage holds `owner`, unless it has no elements."""
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default is here
    return torch.frombuffer(owner, dtype=dtype, count=count).view(shape)


def copy(tensor: torch.Tensor, nbytes: int, owner: Owner) -> None:
    """Copy a CPU tensor of `nbytes` to a place, contiguously, without the GIL."""
    if nbytes < _SMALL and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        ctypes.memmove(owner, tensor.data_ptr(), nbytes)
    else:
        tensor_at(owner, tensor.dtype, tensor.shape).copy_(tensor.detach())


class Grant:
    """A number of bytes that may be reserved, and that nobody else is granted while this object lives.

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
        if _libc.fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes) != 0:
            raise _fail()

    def close(self) -> None:
        """Close the descriptors; the memory goes when the last mapping does."""
        fds, self.fd, self.shared_fd = {self.fd, self.shared_fd}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.close()


def _memfd() -> int:
    create = getattr(_libc, "memfd_create", None)
    if create is None:
        raise OSError(errno.ENOSYS, "not in this C library")
    fd: int = create(b"mmlane", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    if fd < 0:
        raise _fail()
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
    """What a lane may hold unless somebody says otherwise, in bytes: address room, not committed."""
    return host.memory().lane_capacity()
