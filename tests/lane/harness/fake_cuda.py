"""A stand-in for a GPU: streams that stand still until they are told to go on, and memory that is registered.

It takes the place of `mmlane.lane.cuda.Cuda` alone; threads, mappings and everything else are real.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class FakeStream:
    """Work in order, done by `run`. As a device does, a copy reads its source when it is its turn."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.stands_still = False
        self.captures = False
        self._doing = threading.RLock()

    def do(self, work: Callable[[], object]) -> None:
        with self._doing:
            self.work.append(work)
            if not self.stands_still:
                self.run()

    def run(self) -> None:
        """Do all there is, and from now on everything at once."""
        with self._doing:
            self.stands_still = False
            while self.work:
                self.work.pop(0)()

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """`source.to(device, non_blocking=True)`: what it returns has the bytes once the stream has got there."""
        target = torch.zeros_like(source)
        place, nbytes = source.data_ptr(), source.nbytes
        self.do(lambda: ctypes.memmove(target.data_ptr(), place, nbytes))
        return target


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.passed = False

    def query(self) -> bool:
        self._gpu.check()
        return self.passed


class FakeGpu:
    """One device. registered: address -> bytes. broken: what every call fails with. refuses: what pinning does."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.default = FakeStream()
        self.seen: list[FakeStream] = []  # by `torch.cuda.set_stream`
        self.broken = self.refuses = ""
        self.asked = threading.Semaphore(0)  # released at each look
        self._current = threading.local()

    def has_registered(self, tensor: torch.Tensor) -> bool:
        """Whether all of a tensor is registered with the device."""
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= first and end <= start + nbytes for start, nbytes in self.registered.items())

    def check(self) -> None:
        self.asked.release()
        if self.broken:
            raise RuntimeError(self.broken)

    @contextmanager
    def stream(self, stream: FakeStream, *, seen: bool = True) -> Iterator[FakeStream]:
        """Make a stream the thread's current one; seen: by `set_stream`, when the reader watches it."""
        if seen:
            self.seen.append(stream)
        self._current.stream = stream
        yield stream
        del self._current.stream

    @property
    def current(self) -> FakeStream:
        stream: FakeStream = getattr(self._current, "stream", self.default)
        return stream

    # --- as `Cuda` has it ---

    def __call__(self, index: int) -> FakeGpu:
        self.index = index
        return self

    def enter(self) -> None: ...

    def watch_streams(self) -> None: ...

    def register(self, address: int, nbytes: int) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def synchronize(self) -> None:
        self.check()
        for stream in (self.default, *self.seen):
            stream.run()

    def current_stream(self) -> FakeStream:
        return self.current

    def default_stream(self) -> FakeStream:
        return self.default

    def streams(self) -> list[FakeStream]:
        return self.seen

    def record(self, stream: FakeStream) -> FakeEvent | None:
        self.check()
        if stream.captures:
            return None
        event = FakeEvent(self)
        stream.do(lambda: setattr(event, "passed", True))
        return event
