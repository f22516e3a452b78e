"""How bytes get from a rank of one node to a rank of another."""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE = timedelta(seconds=60)  # with a peer that is in the middle of a message
ANY_TIME = timedelta(days=365)  # for a peer that may have nothing to say
_LOOK_S = 0.02  # between two looks after ranks that have not come
_SIZE = 8  # bytes of the number that goes before a message


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: 1-dim uint8, the same memory."""
    return tensor.view(-1).view(torch.uint8)


class Moving(Protocol):
    """Bytes on their way."""

    def wait(self, timeout: timedelta = ...) -> object:
        """Return when they are there, or have left their buffer. Raises RuntimeError: nothing moves any more."""


class Wire(ABC):
    """Moves bytes between processes that are numbered from 0 on. From one to another they arrive in order."""

    @abstractmethod
    def send(self, to: int, data: torch.Tensor) -> Moving:
        """Begin to send `data`: 1-dim uint8, on the CPU, contiguous, not empty, unchanged until it has left."""

    @abstractmethod
    def receive(self, source: int, data: torch.Tensor) -> Moving:
        """Begin to fill `data`, which has to be as large as what is sent; it is undefined until then."""

    def send_object(self, to: int, message: Any, patience: timedelta = PATIENCE) -> None:
        """Send a small object, to a process that may listen only later. Raises RuntimeError."""
        data = pickle.dumps(message)
        sizes = torch.frombuffer(bytearray(len(data).to_bytes(_SIZE, "little")), dtype=torch.uint8)
        for moving in (self.send(to, sizes), self.send(to, torch.frombuffer(bytearray(data), dtype=torch.uint8))):
            moving.wait(patience)

    def receive_object(self, source: int, patience: timedelta = ANY_TIME) -> Any:
        """Wait for a small object. Raises RuntimeError."""
        size = torch.empty(_SIZE, dtype=torch.uint8, device="cpu")
        self.receive(source, size).wait(patience)
        data = torch.empty(int.from_bytes(bytes(size.tolist()), "little"), dtype=torch.uint8, device="cpu")
        self.receive(source, data).wait(PATIENCE)
        return pickle.loads(data.numpy().tobytes())


class TorchWire(Wire):
    """Gloo, as the engine uses it: the same network interface, by GLOO_SOCKET_IFNAME.

    A process group that torch.distributed does not list, between `ranks` alone: all of these, and only these, make
    it, each at its own time.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """Returns when all `ranks`, numbers in the default group, have come. Raises RuntimeError."""
        store = distributed_c10d._get_default_store()
        name = "mmlane/wire/" + "-".join(map(str, ranks))
        store.set(f"{name}/{dist.get_rank()}", "here")
        # Looked at now and then: a rank that waits in the store keeps its other threads from it.
        while not store.check([f"{name}/{rank}" for rank in ranks]):
            time.sleep(_LOOK_S)
        own = distributed_c10d.PrefixStore(name, store)
        self._group: Any = dist.ProcessGroupGloo(own, ranks.index(dist.get_rank()), len(ranks), ANY_TIME)

    def send(self, to: int, data: torch.Tensor) -> Moving:
        moving: Moving = self._group.send([data], to, 0)
        return moving

    def receive(self, source: int, data: torch.Tensor) -> Moving:
        moving: Moving = self._group.recv([data], source, 0)
        return moving
