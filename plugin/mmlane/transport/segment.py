"""A POSIX shared-memory segment for each tensor: the engine's way, and ours where the engine's has faults.

Life of a segment: created by the producer, opened by every reader, unlinked by the first reader that takes
the feature (readers agree beforehand that all have opened it). A segment of ours that is dropped before it
was taken or handed on is unlinked, so that no error path leaks; so does a regular exit of its process.
"""

from __future__ import annotations

import atexit
import errno
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch

from mmlane import host
from mmlane.log import logger
from mmlane.transport import segment_memory
from mmlane.transport.base import Declined, Here, LostFeature, Ownership, Payload, Transport, lost_message
from mmlane.transport.samples import Samples


class Segment(Payload):
    """A tensor in a segment; only its name, shape and dtype travel.

    `Segment.holding(tensor)` makes one of a dense tensor of any shape, strides, dtype and device. In a reader,
    `Segment.opened(name, shape, dtype)` opens one, and keeps the error if that fails: the caller unpickles in the
    middle of a collective with its peers.
    """

    kind = ""
    needs_agreement = True
    what = "the shared-memory segment"
    advice = (
        f". If it happens again, look for what removes files from {host.SHM} (a cleaner, a restarted container,"
        " RemoveIPC of systemd-logind)"
    )

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.error: str | None = None  # why it cannot be taken
        self._handle: segment_memory.SharedMemory | None = None
        self._private: torch.Tensor | None = None
        self.ownership = Ownership.DONE
        # A process forked since holds a copy of this object, and must leave the segment alone.
        self._pid = os.getpid()

    @classmethod
    def holding(cls, tensor: torch.Tensor) -> Segment:
        """Copy a tensor into a new segment, once, on the CPU.

        Raises `OSError` when there is no room (ENOSPC) or no descriptor left, `NotTransportable` for a tensor that
        is more than its bytes. Nothing is left behind then.
        """
        data = segment_memory.plain_bytes(tensor)
        made = cls("", tensor.shape, tensor.dtype)
        if data.numel():
            made.name = segment_memory.store(data)
            made._own()
        return made

    @classmethod
    def opened(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Segment:
        """One that has arrived. Never raises for what the machine lacks: that is kept, and `prepare` tells it."""
        arrived = cls(name, shape, dtype)
        try:
            if arrived._nbytes():
                segment_memory.tell_tracker()
                arrived._handle = segment_memory.SharedMemory(name=name)
                arrived._own()
        except Exception as error:  # noqa: BLE001 - kept for the agreement of all ranks
            arrived.error = f"{type(error).__name__}: {error}"
        return arrived

    def _own(self) -> None:
        self.ownership = Ownership.OURS
        _owned[id(self)] = self

    def state(self) -> dict[str, Any]:
        self.ownership = Ownership.SENT
        return {"shm_name": self.name, "shape": self.shape, "dtype": self.dtype}

    def _nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def prepare(self) -> str | None:
        """Map the feature privately. The segment stays, for readers that have yet to open it."""
        if self.error is None and self._private is None:
            try:
                self._private = self._map()
            except Exception as error:  # noqa: BLE001 - the ranks agree on it: only its request fails
                self.error = f"{type(error).__name__}: {error}"
        return self.error

    def peek(self) -> torch.Tensor | None:
        return self._private if self.prepare() is None else None

    def _map(self) -> torch.Tensor:
        nbytes = self._nbytes()
        if nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self._handle is None:
            self._handle = segment_memory.SharedMemory(name=self.name)
        return segment_memory.mapped_privately(self._handle, nbytes).view(self.dtype).reshape(self.shape)

    def take(self) -> torch.Tensor:
        """A writable tensor, private to this process. The segment is unlinked, on failure too.

        Raises `LostFeature` when it cannot be opened or mapped, and when it was taken before.
        """
        try:
            error = self.prepare()
            if error is not None:
                raise LostFeature(lost_message([self], error))
            assert self._private is not None
            return self._private
        finally:
            self.error = self.error or "already taken here"
            self.release()

    def release(self) -> None:
        handle, self._handle = self._handle, None
        self._private = None
        self.ownership = Ownership.DONE
        if not self.name:
            return
        try:
            if handle is None:
                handle = segment_memory.SharedMemory(name=self.name)
            try:
                handle.unlink()
            finally:
                handle.close()
        except FileNotFoundError:
            return  # a peer was first
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("could not remove %s from %s: %s", self.name, host.SHM, error)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():
            return  # `_leave_nothing` has been here, and the kernel closes the rest
        self._remove_if_ours()
        if (handle := getattr(self, "_handle", None)) is not None:
            handle.close()

    def _remove_if_ours(self) -> None:
        """Remove the segment's name if that is up to this process. For finalizers: takes no lock."""
        if getattr(self, "ownership", None) is Ownership.OURS and self._pid == os.getpid():
            self.ownership = Ownership.DONE
            segment_memory.remove_name(self.name)


_owned: WeakValueDictionary[int, Segment] = WeakValueDictionary()  # once; by id


@atexit.register
def _leave_nothing() -> None:
    """Remove the segments that are up to this process: finalizers come too late to do so."""
    for reference in _owned.valuerefs():
        if (segment := reference()) is not None:
            segment._remove_if_ours()
    segment_memory.tell_tracker()


class EngineSegment(Payload):
    """An instance of the engine's own pointer class, where that has all fixes (from 0.5.21 on)."""

    kind = ""
    needs_agreement = True

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.pointer.__getstate__()
        return state

    @property
    def error(self) -> str | None:
        """As the engine keeps it."""
        error: str | None = self.pointer._materialization_error
        return error

    def prepare(self) -> str | None:
        return self.error

    def peek(self) -> torch.Tensor | None:
        tensor: torch.Tensor | None = self.pointer.tensor
        return tensor

    def take(self) -> torch.Tensor:
        """As the engine takes it, and raising what the engine raises, which then handles that."""
        tensor: torch.Tensor = self.pointer.materialize()
        return tensor

    def release(self) -> None:
        self.pointer.close_and_unlink()


class SegmentTransport(Transport):
    """Carries every dense tensor for which /dev/shm has room."""

    payload = Segment
    where = "segment"
    consequence = "the feature is sent inline, which is slower"

    def __init__(self, here: Here) -> None:
        self._engine_class = here.engine_class
        self._warned: set[str] = set()

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Segment | EngineSegment | Declined:
        try:
            if self._engine_class is None:
                return Segment.holding(tensor)
            return EngineSegment(self._engine_class(tensor))
        except OSError as error:
            if self._engine_class is not None and error.errno in (errno.ENOSPC, errno.ENOMEM):
                error = OSError(error.errno, segment_memory.no_room_message(tensor.numel() * tensor.itemsize))
            return self._declined(f"errno {error.errno}", error)
        except segment_memory.NotTransportable as error:
            return self._declined(str(error), error)

    def receive(self, state: Mapping[str, Any]) -> Segment | EngineSegment:
        if self._engine_class is None:
            return Segment.opened(state["shm_name"], state["shape"], state["dtype"])
        pointer: Any = object.__new__(self._engine_class)
        pointer._shm_handle = None  # which the engine's finalizer looks at, also when this fails:
        pointer.__setstate__(dict(state))
        return EngineSegment(pointer)

    def _declined(self, cause: str, error: Exception) -> Declined:
        if cause not in self._warned:
            self._warned.add(cause)
            logger.warning("%s. The feature is sent inline, which is slower; said once per cause.", str(error))
        return Declined(cause)
