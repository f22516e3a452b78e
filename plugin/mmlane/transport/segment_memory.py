"""A tensor's bytes in POSIX shared memory: stored under a new name, mapped by readers, and the name removed again.

Python's resource tracker hears from Python of every segment, and from here of those whose name was removed.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import torch

from mmlane import host


class NotTransportable(TypeError):
    """A tensor whose bytes alone do not make it up (sparse, quantized, without storage)."""


class SharedMemory(shared_memory.SharedMemory):
    """Python's own, without its finalizer's word at the end of the interpreter, when its module is gone."""

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            super().__del__()


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order: 1-dim, uint8, on the CPU; a view where they lie so already."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise NotTransportable(f"wanted a dense tensor for shared memory, found a {kind} one of {tensor.dtype}")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of no or one element may have any strides, which `view` minds.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def store(data: torch.Tensor) -> str:
    """The name of a new segment with the bytes of `data` (1-dim, uint8). `OSError` leaves nothing behind."""
    tell_tracker()
    nbytes = data.numel()
    segment = SharedMemory(name=host.new_segment_name(), create=True, size=nbytes)
    try:
        if hasattr(os, "posix_fallocate"):
            # A segment gets its pages when they are written, and a full /dev/shm is then a SIGBUS.
            os.posix_fallocate(_descriptor(segment), 0, nbytes)
        torch.frombuffer(segment.buf, dtype=torch.uint8, count=nbytes).copy_(data)
    except BaseException as error:
        segment.unlink()
        segment.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise OSError(error.errno, no_room_message(nbytes)) from error
        raise
    segment.close()
    return segment.name


def _descriptor(segment: SharedMemory) -> int:
    """The open file behind a segment; the standard library keeps it, but does not publish it."""
    descriptor: int = segment._fd  # type: ignore[attr-defined]
    return descriptor


def mapped_privately(segment: SharedMemory, nbytes: int) -> torch.Tensor:
    """The first bytes of a segment: 1-dim, uint8. Writing to it stays in this process, and costs a copy then only.

    The tensor's storage owns the mapping, which goes with the last view of it, whatever becomes of the segment.
    """
    if sys.platform != "linux":
        return torch.frombuffer(segment.buf, dtype=torch.uint8, count=nbytes).clone()
    options: dict[str, Any] = {"access": mmap.ACCESS_COPY}
    if sys.version_info >= (3, 13):
        options["trackfd"] = False
    return torch.frombuffer(mmap.mmap(_descriptor(segment), nbytes, **options), dtype=torch.uint8)


def no_room_message(nbytes: int) -> str:
    """What to say where a segment of that size found no room."""
    free, size = host.room()
    wanted, found = f"{nbytes / 2**20:.1f} MiB", f"{free / 2**20:.1f} MiB free of {size / 2**20:.1f} MiB"
    return (
        f"wanted {wanted} in {host.SHM}, found {found}; enlarge it (docker run --shm-size=..., or a memory-backed"
        " emptyDir on Kubernetes)"
    )


_removed: list[str] = []  # names that the resource tracker still has to hear of
os.register_at_fork(after_in_child=_removed.clear)  # from the parent


def remove_name(name: str) -> None:
    """Remove a segment's name, if it is there. For finalizers: takes no lock.

    The garbage collector may run one while this very thread holds the resource tracker's lock: no unlink() of
    the segment, which takes it. The tracker hears of it later.
    """
    with suppress(FileNotFoundError):  # a peer was first, and has told the tracker
        (host.SHM / name).unlink()
        _removed.append(name)


def tell_tracker() -> None:
    """Have Python's resource tracker forget the segments that were removed behind its back."""
    while _removed:
        resource_tracker.unregister(f"/{_removed.pop()}", "shared_memory")
