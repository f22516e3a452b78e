"""The GPU that a reader copies to: memory is pinned for it, and what was lent to it is released once it has read.

A copy to the device is only queued when `non_blocking=True` returns, and from pinned memory the device reads the
lane itself, later. So an extent whose tensor is gone may still be read. It is released once events, recorded on
every stream that may have been told to copy it, have passed.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from mmlane.lane import cuda
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.memory import Backing
from mmlane.lane.pinned import Pinned

logger = logging.getLogger("mmlane.lane")

_POLL = 0.005  # seconds between looks at events that have not passed
_AFTER_ERROR = 1.0  # seconds before CUDA is asked again after it has failed
_AT_EXIT = 5.0  # seconds at most to wait for it

_Settling: TypeAlias = "tuple[object, Callable[[], object]]"  # a loan, and what is to be done then


class Device:
    """What a reader's tensors are copied to: settles loans in a thread of its own, and pins memory in others.

    A loan, any object, is settled once no stream can be reading what it lent: what was to be done then, that
    thread does.
    """

    def __init__(self, index: int) -> None:
        self._cuda = cuda.Cuda(index)
        self._pid = os.getpid()
        self._work: SimpleQueue[tuple[_Settling, Any] | None] = SimpleQueue()  # safe in finalizers
        self._known: dict[Any, None] = {}  # streams that were current where tensors were taken
        self._noting = threading.Lock()
        self._owed: set[object] = set()  # loans to be settled
        self._stopped = self._exiting = False
        self._ended = threading.Event()
        self._pinned: weakref.WeakSet[Pinned] = weakref.WeakSet()
        cuda.watch_streams()
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
        self,
        file: Descriptor | Backing,
        offset: int,
        nbytes: int,
        then: Callable[[Pinned | Exception], None],
        *,
        to_write: bool = False,
    ) -> None:
        """Map and register a part of a file in the background; `then` is given it, or why it cannot be had."""

        def pin() -> None:
            try:
                self._cuda.enter()
                pinned = Pinned(self._cuda, file.fd, offset, nbytes, to_write=to_write)
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

    def drop(self, held: list[Pinned]) -> None:
        """Empty a list, which alone keeps what is pinned, when the device has done all that it was told so far.

        In this object's thread: CUDA takes its time to unregister, and may not come back.
        """
        loan = object()
        self.owe(loan)
        self.settle(loan, held.clear)

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
                # What the device still reads is unknown, so nothing is released: at worst the lane is full.
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
