"""The GPU that a reader copies to: host memory registered for it, and releases that wait until it has read.

A copy to the device is only queued when `non_blocking=True` returns, and from pinned memory the device reads the
lane itself, later. So an extent whose tensor is gone may still be read. It is released once events, recorded on
every stream that may have been told to copy it, have passed.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import torch

from mmlane.lane import memory

logger = logging.getLogger("mmlane.lane")

_POLL = 0.005  # seconds between looks at events that have not passed
_AFTER_ERROR = 1.0  # seconds before CUDA is asked again after it has failed
_AT_EXIT = 5.0  # seconds at most to wait for it
_PORTABLE = 0x01  # cudaHostRegisterPortable
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_streams: dict[Any, None] = {}  # that were made current since `watch_streams`, in any thread


def watch_streams() -> None:
    """Note from now on every stream that is made current through torch.cuda; torch does not list them."""
    set_stream = torch.cuda.set_stream
    if getattr(set_stream, "_notes_streams", False):
        return

    @wraps(set_stream)
    def noting(stream: Any) -> None:
        set_stream(stream)
        if stream is not None:
            _streams.setdefault(stream)

    noting._notes_streams = True  # type: ignore[attr-defined]
    torch.cuda.set_stream = noting
    enter = getattr(torch.cuda.Stream, "__enter__", None)  # from 2.7 on; `with stream:` does not call set_stream
    if enter is not None:

        def entering(stream: Any) -> Any:
            _streams.setdefault(stream)
            return enter(stream)

        torch.cuda.Stream.__enter__ = entering  # type: ignore[method-assign]


class Cuda:
    """The calls that a reader makes to one device, through torch: nothing but these.

    Raises ValueError where torch has no such device.
    """

    def __init__(self, index: int) -> None:
        if not index < torch.cuda.device_count():
            raise ValueError(
                f"device cuda:{index}: torch {torch.__version__} finds {torch.cuda.device_count()} here"
            )
        self.index = index

    def enter(self) -> None:
        """For a thread of ours: use this device, and do not disturb a graph capture in another thread."""
        torch.cuda.set_device(self.index)
        mode = ctypes.c_int(_RELAXED)
        with suppress(OSError, AttributeError):  # no libcuda: nothing of this would have worked
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, which must be mapped to write. Raises RuntimeError with CUDA's reason."""
        self._call("cudaHostRegister", address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo `register`. Raises RuntimeError with CUDA's reason."""
        self._call("cudaHostUnregister", address)

    @staticmethod
    def _call(name: str, *arguments: int) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = getattr(cudart, name)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{name}: {cudart.cudaGetErrorString(error)}")

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told."""
        torch.cuda.synchronize(self.index)

    def current_stream(self) -> Any:
        """The stream that the calling thread's work goes to now."""
        return torch.cuda.current_stream(self.index)

    def default_stream(self) -> Any:
        return torch.cuda.default_stream(self.index)

    def record(self, stream: Any) -> Any | None:
        """An event behind all that the stream has been given; None while it is being captured into a graph."""
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                return None
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            # A capture that began meanwhile has the event in its graph, and would be spoilt by a query.
            return None if torch.cuda.is_current_stream_capturing() else event

    def streams(self) -> list[Any]:
        """The streams of this device that have been made current since `watch_streams`."""
        return [stream for stream in list(_streams) if stream.device_index == self.index]


class Pinned(memory.Mapping):
    """A second mapping of the part of a lane that stays committed, registered with CUDA until it dies.

    Another than the one that is joined with: CUDA refuses copies that are registered in part, so a tensor lies in
    here as a whole or not at all. It can be written to until CUDA has it: many drivers refuse to register a
    read-only mapping (cudaDevAttrHostRegisterReadOnlySupported).
    """

    def __init__(self, cuda: Cuda, fd: int, offset: int, nbytes: int) -> None:
        self._cuda: Cuda | None = None
        self._stays = False
        self.offset = offset
        writable = memory.Descriptor(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        super().__init__(writable.fd, nbytes, offset=offset, writable=True)
        self.populate(0, nbytes)
        cuda.register(self.address, nbytes)
        self._cuda = cuda
        self.protect()

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether a range of the lane's file lies in here as a whole."""
        return self.offset <= offset and offset + nbytes <= self.offset + self.nbytes

    def unpin(self) -> None:
        """Undo the registration; the mapping stays. Only when no copy from here can be under way."""
        cuda, self._cuda = self._cuda, None
        if cuda is not None:
            try:
                cuda.unregister(self.address)
            except RuntimeError as error:  # CUDA has failed, or is shut down
                self._stays = True
                logger.debug("pinned memory of a lane stays as it is until the process ends: %s", str(error))

    def unmap(self) -> None:
        self.unpin()
        if self._stays:  # else CUDA would take what is mapped here next for what it has registered
            self._places.clear()
        super().unmap()


_Settling: TypeAlias = "tuple[object, Callable[[], object]]"  # a loan, and what is to be done then


class Device:
    """What a reader's tensors are copied to: settles loans in a thread of its own, and pins memory in others.

    A loan, any object, is settled once no stream can be reading what it lent: what was to be done then, that
    thread does.
    """

    def __init__(self, index: int) -> None:
        self._cuda = Cuda(index)
        self._pid = os.getpid()
        self._work: SimpleQueue[tuple[_Settling, Any] | None] = SimpleQueue()  # safe in finalizers
        self._known: dict[Any, None] = {}  # streams that were current where tensors were taken
        self._noting = threading.Lock()
        self._owed: set[object] = set()  # loans to be settled
        self._stopped = self._exiting = False
        self._ended = threading.Event()
        self._pinned: weakref.WeakSet[Pinned] = weakref.WeakSet()
        watch_streams()
        self._thread = threading.Thread(target=self._run, name=f"mmlane-cuda-{index}", daemon=True)
        atexit.register(self._at_exit)
        try:
            self._thread.start()
        except BaseException:  # no thread can be had; or a signal handler raised, and it may run
            self.stop()
            self._ended.set()
            raise

    def owe(self, loan: object) -> None:
        """There is one more loan to settle; the calling thread copies with the stream that it has now."""
        self._known.setdefault(self._cuda.current_stream())
        self._owed.add(loan)

    def settle(self, loan: object, then: Callable[[], object]) -> None:
        """Call `then` when the device has done all that it was told so far. For finalizers: waits for nothing.

        Can be said again, should it have been interrupted.
        """
        if os.getpid() == self._pid:
            self._work.put(((loan, then), self._cuda.current_stream()))

    def pin(
        self, file: memory.Descriptor, offset: int, nbytes: int, then: Callable[[Pinned | Exception], None]
    ) -> None:
        """Map and register a part of a file in the background; `then` is given it, or why it cannot be had."""

        def pin() -> None:
            try:
                self._cuda.enter()
                pinned = Pinned(self._cuda, file.fd, offset, nbytes)
                with self._noting:
                    self._pinned.add(pinned)
            except Exception as error:  # noqa: BLE001 - torch has many ways to say that CUDA does not work
                then(error)
            else:
                then(pinned)

        try:
            threading.Thread(target=pin, name="mmlane-pinning", daemon=True).start()
        except RuntimeError as error:
            then(error)

    def stop(self) -> None:
        """End when every loan is settled."""
        self._stopped = True
        self._work.put(None)

    def _at_exit(self) -> None:
        """The process is about to end: unregister what is pinned, unless the device does not come to an end."""
        if os.getpid() == self._pid:
            self._exiting = True
            self._work.put(None)
            self._ended.wait(_AT_EXIT)

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        let_go: list[_Settling] = []  # for which nothing is recorded yet
        streams: set[Any] = set()
        recorded: list[tuple[list[Any], list[_Settling]]] = []
        entered = False
        pause = _POLL
        while not self._exiting and (not self._stopped or self._owed):
            self._receive(let_go, streams, pause if let_go or recorded else None)
            try:
                if let_go and not entered:
                    self._cuda.enter()
                    entered = True
                if let_go and (events := self._record(streams)) is not None:
                    recorded.append((events, let_go))
                    let_go, streams = [], set()
                while recorded and all(event.query() for event in recorded[0][0]):
                    self._finish(recorded.pop(0)[1])
                pause = _POLL
            except Exception as error:  # noqa: BLE001 - torch has many ways to say that CUDA has failed
                # Nobody can say what the device still reads, so nothing is released: at worst the lane is full.
                if pause == _POLL:
                    logger.warning(
                        "a lane's reader cannot tell what the GPU has read, and keeps it: %s", str(error)
                    )
                pause = _AFTER_ERROR
                while recorded:  # other events, then
                    let_go += recorded.pop()[1]
        if self._exiting:
            self._unpin_all()
        atexit.unregister(self._at_exit)
        self._ended.set()

    def _receive(self, let_go: list[_Settling], streams: set[Any], timeout: float | None) -> None:
        with suppress(Empty):
            item = self._work.get(timeout=timeout)
            while True:
                if item is not None:
                    let_go.append(item[0])
                    streams.add(item[1])
                item = self._work.get_nowait()

    def _finish(self, settling: list[_Settling]) -> None:
        while settling:
            self._owed.discard(settling[-1][0])
            try:
                settling.pop()[1]()  # and no name here keeps it, and its mapping, alive
            except Exception as error:  # noqa: BLE001 - the others' room is to come back all the same
                logger.error("a lane's reader could not release a tensor: %s", repr(error))

    def _record(self, streams: set[Any]) -> list[Any] | None:
        """Events on every stream that may have been told to copy; None while one of them is being captured."""
        streams.update(self._known, self._cuda.streams(), (self._cuda.default_stream(),))
        events = []
        for stream in streams:
            event = self._cuda.record(stream)
            if event is None:
                return None
            events.append(event)
        return events

    def _unpin_all(self) -> None:
        with self._noting:
            pinned = list(self._pinned)
        if not pinned:
            return  # asking CUDA would make a context now
        try:
            self._cuda.synchronize()
            while pinned:
                pinned.pop().unpin()
        except Exception as error:  # noqa: BLE001 - CUDA has failed; the kernel undoes it
            logger.debug("pinned memory of a lane stays as it is until the process ends: %s", str(error))
