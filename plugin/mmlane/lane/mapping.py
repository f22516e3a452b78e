"""Mappings of a lane's memory in this process, and tensors over them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import ClassVar

import torch

from mmlane import host
from mmlane.lane.libc import BRIEF, copy, failure, libc

PAGE = mmap.PAGESIZE

_MADV_DONTDUMP = 16
_MADV_POPULATE_WRITE = 23  # Python names it from 3.14 on
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_PRIVATE_SHARE = 4  # private mappings take so much of a process's mappings: one part in this many
_MAX_MAP_COUNT = 65530  # the kernel's own default


class Owner(ctypes.c_ubyte * (1 << 46)):  # type: ignore[misc]
    """Points at a place in a mapping, for a tensor's storage to hold. What it `keeps` lives as long as that.

    One type for any length: ctypes makes a type per array length, and types are only freed by the garbage
    collector. It allocates nothing; the code that reads through it says how many bytes.
    """

    keeps: object = None


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

    writable: the producer's way, every reader sees changes. private: an edit is seen here alone and costs a
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
        self._places.extend(map(libc.mmap, (None,), (nbytes,), (protection,), (flags,), (fd,), (offset,)))
        if self._places == [_MAP_FAILED]:
            self._places.clear()
            raise failure()
        if private:
            self.private = True
            self._private[self.address] = None
        libc.madvise(self.address, nbytes, _MADV_DONTDUMP)

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
        return bool(libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_WRITE) == 0)

    def protect(self) -> None:
        """From now on it is read-only. Raises OSError."""
        if libc.mprotect(self.address, self.nbytes, mmap.PROT_READ) != 0:
            raise failure()

    def unmap(self) -> None:
        """Let the range go. Code that still reads from it would crash: only for a caller that knows of none."""
        if self._places:
            _unmap(self._places, self.nbytes)
        self._mapped.pop(self._note, None)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending() and hasattr(self, "_note"):
            self.unmap()


def _unmap(places: list[int], nbytes: int) -> None:
    Mapping._private.pop(places[0], None)  # before the next mapping can have it
    next(map(libc.munmap, iter(places.pop, None), (nbytes,)))  # in C as a whole, as above


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


def tensor_at(owner: Owner, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor over what `owner` points to; its storage holds `owner`, unless it has no elements."""
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default is here
    return torch.frombuffer(owner, dtype=dtype, count=count).view(shape)


def lies_as_it_is(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes are those of its elements, in their order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def copy_tensor(tensor: torch.Tensor, nbytes: int, owner: Owner) -> None:
    """Copy a CPU tensor of `nbytes` to a place, contiguously."""
    # A longer one is worth torch's threads, though torch gives up the GIL several times.
    if lies_as_it_is(tensor) and (nbytes <= BRIEF or torch.get_num_threads() == 1):
        copy(owner, tensor.data_ptr(), nbytes)
    else:
        tensor_at(owner, tensor.dtype, tensor.shape).copy_(tensor.detach())
