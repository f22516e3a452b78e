"""The ways to have a tensor's bytes in the consumer: for each a producer's end and a consumer's end."""

from __future__ import annotations

import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from math import prod
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import Device
from mmlane.bench.workers import Refusal
from mmlane.lane import Invitation, Lane, Reader, Refused
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.mapping import round_up

TORCH_PINNED, PAGEABLE, SHARED = "torch pinned", "pageable", "shared"
SEGMENT = "engine segment"
LANE_PAGEABLE, LANE_PINNED = "lane pageable", "lane pinned"
BY_IMAGE = "lane pinned, image by image"  # each is copied to the device while others are put
POOL, POOL_AS_IT_COMES = "cuda ipc pool", "cuda ipc pool, not redirected"

SEGMENTS = "mmlane-bench"  # how names in /dev/shm begin
_GROUP = "bench"
_PATIENCE_S = 120.0
_IDLE_S = 3600.0  # memory is kept over the other ways' turns
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Load:
    """`count` tensors of one shape, of words of 8 bytes or of what fills such."""

    label: str
    shape: tuple[int, ...]
    count: int = 1
    dtype: torch.dtype = torch.int64

    @property
    def nbytes(self) -> int:
        return self.count * prod(self.shape) * self.dtype.itemsize


def fill(tensor: Tensor) -> None:
    """0, 1, 2, ... in words of 8 bytes."""
    words = tensor.view(-1).view(torch.int64)
    torch.arange(words.numel(), out=words)


def mark(tensor: Tensor, seed: int) -> None:
    """Make a filled tensor this round's."""
    tensor.view(-1).view(torch.int64)[0] = seed


def is_right(tensor: Tensor, seed: int) -> bool:
    """Whether it has the sum of a tensor that was filled and marked; reads every byte."""
    words = tensor.view(-1).view(torch.int64)
    return int(words.sum()) == words.numel() * (words.numel() - 1) // 2 + seed


class Sender(ABC):
    """A producer's end. `address`: what consumers need to find it."""

    address: Any = None

    def ready(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Called when every consumer has its end."""

    @abstractmethod
    def send(self, tensors: Sequence[Tensor], seed: int) -> list[Any]:
        """A message for each tensor. Raises Refusal."""

    def free(self) -> None:  # noqa: B027 - most keep nothing
        """Free what was sent; every consumer has let go of it."""

    def close(self) -> None: ...  # noqa: B027


class Receiver(ABC):
    """A consumer's end."""

    @abstractmethod
    def receive(self, messages: Sequence[Any]) -> list[Tensor]:
        """The tensors, to be copied to the device from where they are."""

    def close(self) -> None: ...  # noqa: B027


class _LaneSender(Sender):
    """`pinned`: how much of its `nbytes` is for the consumers to pin."""

    def __init__(self, consumers: int, nbytes: int, pinned: int) -> None:
        self._lane = Lane({_GROUP: consumers}, capacity=nbytes, pinned=pinned, idle=_IDLE_S)
        self.address = self._lane.invitation

    def ready(self) -> None:
        if not self._lane.wait_open(_PATIENCE_S):
            raise TimeoutError(f"the lane did not open in {_PATIENCE_S:g} s")

    def send(self, tensors: Sequence[Tensor], seed: int) -> list[Any]:
        tickets = [self._lane.put(tensor) for tensor in tensors]
        for ticket in tickets:
            if isinstance(ticket, Refused):
                raise Refusal(f"{ticket.cause}: {ticket.detail}")
        return tickets

    def free(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while self._lane.stats().tickets:  # released when the devices have read them, a moment later
            if time.monotonic() > deadline:
                raise TimeoutError(f"tickets were not released in {_PATIENCE_S:g} s")
            os.sched_yield()

    def close(self) -> None:
        self._lane.close()


class _LaneReceiver(Receiver):
    def __init__(self, invitation: Invitation, number: int, device: Device, pinned: bool) -> None:
        self._name = invitation.name
        self._pinned = pinned and not device.rehearse
        self._reader = Reader(_GROUP, number, device=None if device.rehearse else device.torch)
        self._reader.join(invitation, _PATIENCE_S)

    def receive(self, messages: Sequence[Any]) -> list[Tensor]:
        if self._pinned and not self._reader.wait_pinned(self._name, _PATIENCE_S):
            raise RuntimeError(f"the pinned zone could not be registered, or not in {_PATIENCE_S:g} s")
        tensors = [self._reader.take(ticket, "view") for ticket in messages]
        if self._pinned and not all(tensor.is_pinned() for tensor in tensors):
            raise RuntimeError("a tensor lies outside the pinned zone")
        return tensors

    def close(self) -> None:
        self._reader.close()


class _SegmentSender(Sender):
    def __init__(self) -> None:
        self._segments = ExitStack()
        self._numbers = count()

    def send(self, tensors: Sequence[Tensor], seed: int) -> list[Any]:
        return [self._put(tensor) for tensor in tensors]

    def _put(self, tensor: Tensor) -> tuple[str, torch.dtype, torch.Size]:
        nbytes = tensor.numel() * tensor.itemsize
        segment = SharedMemory(f"{SEGMENTS}_{os.getpid()}_{next(self._numbers)}", create=True, size=nbytes)
        self._segments.callback(segment.unlink)
        try:
            with (_SHM / segment.name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise Refusal(f"no room for {nbytes} bytes in {_SHM} ({error}): make it larger") from error
        copy = torch.frombuffer(segment.buf, dtype=torch.uint8, count=nbytes)
        copy.copy_(tensor.view(-1).view(torch.uint8))
        del copy
        segment.close()
        return segment.name, tensor.dtype, tensor.shape

    def free(self) -> None:
        self._segments.close()

    def close(self) -> None:
        self.free()


class _SegmentReceiver(Receiver):
    def receive(self, messages: Sequence[Any]) -> list[Tensor]:
        return [self._map(*message) for message in messages]

    def _map(self, name: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        with (_SHM / name).open("rb") as file:
            private = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(private, dtype=dtype).view(shape)


def _shared(nbytes: int) -> tuple[Descriptor, Tensor]:
    """A memfd, and a tensor over all of it, mapped MAP_SHARED."""
    file = Descriptor(os.memfd_create("mmlane-bench"))
    os.posix_fallocate(file.fd, 0, nbytes)
    return file, torch.from_file(f"/proc/self/fd/{file.fd}", shared=True, size=nbytes, dtype=torch.uint8)


class _PoolSender(Sender):
    """In a rehearsal the pool is a memfd, its handle a path."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        device.enter()
        if device.rehearse:
            self._file, self._pool = _shared(nbytes)
            self._handle: tuple[Any, ...] = (device.index, f"/proc/{os.getpid()}/fd/{self._file.fd}", nbytes)
        else:
            self._pool = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch)
            device.synchronize()
            storage: Any = self._pool.untyped_storage()
            self._handle = storage._share_cuda_()

    def send(self, tensors: Sequence[Tensor], seed: int) -> list[Any]:
        messages, offset = [], 0
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.itemsize
            if offset + nbytes > self._pool.numel():
                raise Refusal(f"the pool of {self._pool.numel()} bytes is too small")
            place = self._pool[offset : offset + nbytes]
            place.copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
            messages.append((self._handle, offset, nbytes, tensor.dtype, tensor.shape))
            offset += round_up(nbytes)
        self._device.synchronize()
        return messages


class _PoolReceiver(Receiver):
    def __init__(self, device: Device, redirect: bool) -> None:
        self._device = device
        self._redirect = redirect
        self._pools: dict[tuple[Any, ...], Tensor] = {}  # opened once, kept

    def receive(self, messages: Sequence[Any]) -> list[Tensor]:
        return [
            self._open(handle)[offset : offset + nbytes].view(dtype).view(shape)
            for handle, offset, nbytes, dtype, shape in messages
        ]

    def _open(self, handle: tuple[Any, ...]) -> Tensor:
        if handle not in self._pools:
            index = self._device.index if self._redirect else handle[0]
            if self._redirect and not self._device.reaches(handle[0]):
                raise Refusal(f"no peer access from GPU {index} to GPU {handle[0]}")
            if self._device.rehearse:
                self._pools[handle] = torch.from_file(handle[1], shared=True, size=handle[2], dtype=torch.uint8)
            else:
                storage = torch.UntypedStorage._new_shared_cuda(index, *handle[1:])
                empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
                self._pools[handle] = empty.set_(storage)
        return self._pools[handle]

    def close(self) -> None:
        self._pools.clear()


class _OwnSender(Sender):
    """Tells the consumer what to make itself."""

    def send(self, tensors: Sequence[Tensor], seed: int) -> list[Any]:
        return [(number, tensor.shape, tensor.dtype, seed) for number, tensor in enumerate(tensors)]


class _OwnReceiver(Receiver):
    def __init__(self, way: str, device: Device) -> None:
        self._way = way
        self._device = device
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def receive(self, messages: Sequence[Any]) -> list[Tensor]:
        wanted = [message[:3] for message in messages]
        if list(self._made) != wanted:
            self._made.clear()
            for number, shape, dtype in wanted:
                made = self._made[number, shape, dtype] = self._make(shape, dtype)
                fill(made)
        for tensor, message in zip(self._made.values(), messages, strict=True):
            mark(tensor, message[3])
        return list(self._made.values())

    def _make(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self._way != SHARED:
            pin = self._way == TORCH_PINNED and not self._device.rehearse
            return torch.empty(shape, dtype=dtype, pin_memory=pin)
        _, tensor = _shared(prod(shape) * dtype.itemsize)
        return tensor.view(dtype).view(shape)


_LANES = (LANE_PAGEABLE, LANE_PINNED, BY_IMAGE)


def sender(way: str, consumers: int, nbytes: int, device: Device) -> Sender:
    """`nbytes`: the most that is sent at a time; `device`: the producer's, which a pool alone uses."""
    if way in _LANES:
        return _LaneSender(consumers, nbytes, 0 if way == LANE_PAGEABLE else nbytes)
    if way in (POOL, POOL_AS_IT_COMES):
        return _PoolSender(device, nbytes)
    return _SegmentSender() if way == SEGMENT else _OwnSender()


def receiver(way: str, address: Any, number: int, device: Device) -> Receiver:
    """The other end of `sender`, for the consumer of that number, on `device`."""
    if way in _LANES:
        return _LaneReceiver(address, number, device, way != LANE_PAGEABLE)
    if way in (POOL, POOL_AS_IT_COMES):
        return _PoolReceiver(device, redirect=way == POOL)
    return _SegmentReceiver() if way == SEGMENT else _OwnReceiver(way, device)
