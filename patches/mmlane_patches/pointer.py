"""The pointer class that travels in a feature's place: one POSIX shared-memory segment per tensor.

`SegmentPointer` is the class proper; it knows nothing of the engine. `ShmPointerMMData` is the same under the
engine's name, and what the engine's own code sees: called with a tensor, it gives a pointer, or the tensor
itself where it cannot travel by pointer, which the engine then pickles inline.

Life of a segment: created by the producer, opened by every reader, unlinked by the first reader that takes
the feature (readers agree beforehand that all have opened it). Whoever holds a pointer that is dropped without
having been taken or handed on unlinks it, so that no error path leaks; so does a regular exit of its process.
"""

from __future__ import annotations

import atexit
import errno
import logging
import math
import mmap
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from mmlane import host
from mmlane_patches.guard import failed

logger = logging.getLogger("mmlane")

PREFIX = "mmlane_"

# While a request is sent: the pointers that were made for it (see `sending`).
made_here: ContextVar[list[Any] | None] = ContextVar("made_here", default=None)
SHM = Path("/dev/shm")


class LostSegment(RuntimeError):
    """A feature cannot be read, because its shared-memory segment cannot be opened or mapped."""


class NotTransportable(TypeError):
    """A tensor whose bytes alone do not make it up (sparse, quantized, without storage)."""


class SegmentPointer:
    """A tensor in a shared-memory segment of its own; pickled, only its name, shape, dtype and hash travel.

    `tensor` may have any shape (also 0-dim and empty), strides, dtype and device; it is copied once, to the CPU.
    `precomputed_hash` is carried along for the engine.

    Raises `OSError` when there is no room (ENOSPC) or no descriptor left, `NotTransportable` for a tensor that
    is more than its bytes. Nothing is left behind then.
    """

    shm_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    precomputed_hash: int | None

    def __init__(self, tensor: torch.Tensor, precomputed_hash: int | None = None) -> None:
        self._clear()
        self.precomputed_hash = precomputed_hash
        data = plain_bytes(tensor)
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        if data.numel():
            self.shm_name = _store(data)
            self._answer_for_it()
            if (made := made_here.get()) is not None:
                made.append(self)

    def _clear(self) -> None:
        self.shm_name = ""
        self.shape = ()
        self.dtype = torch.uint8
        self.precomputed_hash = None
        self._shm_handle: SharedMemory | None = None
        self._private: torch.Tensor | None = None
        self._materialization_error: str | None = None
        # The process that has to unlink the segment when this object is dropped; 0 when nobody has to.
        # A process forked meanwhile holds a copy of this object, and must leave the segment alone.
        self._answerable = 0

    def _answer_for_it(self) -> None:
        self._answerable = os.getpid()
        _answered_for[id(self)] = self

    # --- travelling ---

    def __copy__(self) -> SegmentPointer:
        """The same pointer: a segment is taken once, and a second object would unlink it when dropped."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SegmentPointer:
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._answerable = 0  # now the receiver's
        return {
            "shm_name": self.shm_name,
            "shape": self.shape,
            "dtype": self.dtype,
            "precomputed_hash": self.precomputed_hash,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the segment. Never raises: whoever unpickles is in the middle of a collective with its peers."""
        self._clear()
        try:
            self.shm_name = state["shm_name"]
            self.shape = state["shape"]
            self.dtype = state["dtype"]
            self.precomputed_hash = state.get("precomputed_hash")
            if self._nbytes():
                _tell_tracker()
                self._shm_handle = SharedMemory(name=self.shm_name)
                self._answer_for_it()
        except Exception as error:  # noqa: BLE001 - kept for materialize(), which reports it
            self._materialization_error = f"{type(error).__name__}: {error}"

    def _nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    # --- taking ---

    @property
    def tensor(self) -> torch.Tensor | None:
        """The feature in this process's private memory, or None where it cannot be read."""
        return self._private if self.prepare() is None else None

    def prepare(self) -> str | None:
        """Map the feature privately, without taking it: None, or why that is impossible. Never raises.

        After None, `materialize()` succeeds. The segment stays, for readers that have yet to open it.
        """
        if self._materialization_error is None and self._private is None:
            try:
                self._private = self._map()
            except Exception as error:  # noqa: BLE001 - the ranks agree on it: only its request fails
                self._materialization_error = f"{type(error).__name__}: {error}"
        return self._materialization_error

    def _map(self) -> torch.Tensor:
        nbytes = self._nbytes()
        if nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self._shm_handle is None:
            self._shm_handle = SharedMemory(name=self.shm_name)
        if sys.platform != "linux":
            shared = torch.frombuffer(self._shm_handle.buf, dtype=torch.uint8, count=nbytes)
            return shared.clone().view(self.dtype).reshape(self.shape)
        # Private and copy-on-write: reading costs no copy, writing stays here. The tensor's storage owns the
        # mapping, which goes with the last view of it, whatever becomes of the segment meanwhile.
        options: dict[str, Any] = {"access": mmap.ACCESS_COPY}
        if sys.version_info >= (3, 13):
            options["trackfd"] = False
        mapping = mmap.mmap(_descriptor(self._shm_handle), nbytes, **options)
        return torch.frombuffer(mapping, dtype=torch.uint8).view(self.dtype).reshape(self.shape)

    def materialize(self) -> torch.Tensor:
        """Take the feature: a writable CPU tensor of the original shape and dtype, private to this process.

        The segment is unlinked, on failure too. Raises `LostSegment` when it cannot be opened or mapped, and
        when the feature was taken before.
        """
        try:
            error = self.prepare()
            if error is not None:
                raise LostSegment(lost_message([self.shm_name], error))
            assert self._private is not None
            return self._private
        finally:
            self._materialization_error = self._materialization_error or "already taken here"
            self.close_and_unlink()

    def close_and_unlink(self) -> None:
        """Let go of the segment and remove its name; does nothing where that has happened. Never raises."""
        handle, self._shm_handle = self._shm_handle, None
        self._private = None
        self._answerable = 0
        if not self.shm_name:
            return
        try:
            if handle is None:
                handle = SharedMemory(name=self.shm_name)
            try:
                handle.unlink()
            finally:
                handle.close()
        except FileNotFoundError:
            return  # a peer was first
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("mmlane: could not remove %s from %s: %s", self.shm_name, SHM, error)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():
            return  # `_leave_nothing` has been here, and the kernel closes the rest
        self._remove_if_answerable()
        if (handle := getattr(self, "_shm_handle", None)) is not None:
            handle.close()

    def _remove_if_answerable(self) -> None:
        """Remove the segment's name if that is up to this process. For finalizers: takes no lock.

        The garbage collector may run one while this very thread holds the resource tracker's lock: no unlink() of
        the segment, which takes it. The tracker hears of it later.
        """
        if getattr(self, "_answerable", 0) == os.getpid():
            self._answerable = 0
            with suppress(FileNotFoundError):  # a peer was first, and has told the tracker
                (SHM / self.shm_name).unlink()
                _removed.append(self.shm_name)


class _PointerOrTensor(type):
    """Makes a call of the class give the tensor itself, with one warning a cause, where there is no pointer."""

    def __call__(cls, tensor: torch.Tensor, precomputed_hash: int | None = None) -> Any:
        try:
            return super().__call__(tensor, precomputed_hash)
        except OSError as error:
            warn_once(f"errno {error.errno}", error)
        except NotTransportable as error:
            warn_once(str(error), error)
        except Exception as error:  # noqa: BLE001 - the feature goes another way
            failed("segment", error, "the feature is sent inline, which is slower")
        return tensor


class ShmPointerMMData(SegmentPointer, metaclass=_PointerOrTensor):
    """`SegmentPointer` as the engine and its message codec know it: by this name, in this module."""

    __module__ = "sglang.srt.managers.mm_utils"


def in_its_place(engines_own: type) -> type:
    """The class that takes the place of the engine's."""
    return ShmPointerMMData


_warned: set[str] = set()


def warn_once(cause: str, error: Exception) -> None:
    if cause not in _warned:
        _warned.add(cause)
        logger.warning("mmlane: %s. The feature is sent inline, which is slower; said once per cause.", error)


def lost_message(names: list[str], cause: str) -> str:
    """What a reader says of segments that it cannot read: which, what follows, what to do."""
    return (
        f"multimodal features are lost: the shared-memory segment {', '.join(names)} cannot be read ({cause}). "
        f"Only this request fails; send it again. If it happens again, look for what removes files from {SHM} "
        "(a cleaner, a restarted container, RemoveIPC of systemd-logind)"
    )


# --- segments -----------------------------------------------------------------------------------------------


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order: 1-dim, uint8, on the CPU; a view where they lie so already."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise NotTransportable(f"wanted a dense tensor for shared memory, found a {kind} one of {tensor.dtype}")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of no or one element may have any strides, which `view` minds.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class SharedMemory(shared_memory.SharedMemory):
    """Python's own, without its finalizer's word at the end of the interpreter, when its module is gone."""

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            super().__del__()


_removed: list[str] = []  # names that the resource tracker still has to hear of
os.register_at_fork(after_in_child=_removed.clear)  # from the parent
_answered_for: WeakValueDictionary[int, SegmentPointer] = WeakValueDictionary()  # once; by id


def _tell_tracker() -> None:
    """Have Python's resource tracker forget the segments that were removed behind its back."""
    while _removed:
        resource_tracker.unregister(f"/{_removed.pop()}", "shared_memory")


@atexit.register
def _leave_nothing() -> None:
    """Remove the segments that this process is answerable for: finalizers come too late to do so."""
    for reference in _answered_for.valuerefs():
        if (pointer := reference()) is not None:
            pointer._remove_if_answerable()
    _tell_tracker()


def _store(data: torch.Tensor) -> str:
    """The name of a new segment with the bytes of `data` (1-dim, uint8). `OSError` leaves nothing behind."""
    _tell_tracker()
    nbytes = data.numel()
    segment = SharedMemory(name=segment_name(), create=True, size=nbytes)
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


def no_room_message(nbytes: int) -> str:
    stat = os.statvfs(SHM)
    free, size = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    return (
        f"wanted {nbytes / 2**20:.1f} MiB in {SHM}, found {free / 2**20:.1f} MiB free of {size / 2**20:.1f} MiB; "
        "enlarge it (docker run --shm-size=..., or a memory-backed emptyDir on Kubernetes)"
    )


def segment_name() -> str:
    """A fresh name that tells for certain whose it is: mmlane_PID_STARTTIME_PIDNAMESPACE_RANDOM.

    STARTTIME is field 22 of /proc/PID/stat (clock ticks since boot), PIDNAMESPACE the inode of /proc/PID/ns/pid;
    both are 0 where /proc does not tell.
    """
    pid = os.getpid()
    return f"{PREFIX}{pid}_{_identity(pid)}_{secrets.token_hex(8)}"


@lru_cache(maxsize=1)
def _identity(pid: int) -> str:
    process, namespace = host.process(pid), host.pid_namespace()
    return "0_0" if process is None or namespace is None else f"{process.started}_{namespace}"
