"""The part of a lane that stays committed, registered with CUDA by the producer as well: devices write to it."""

from __future__ import annotations

import logging
import threading

from mmlane.lane.committing import Committer
from mmlane.lane.device import Device
from mmlane.lane.pinnable import Pinnable
from mmlane.lane.pinned import Pinned

logger = logging.getLogger("mmlane.lane")


class Registration:
    """Has that part registered once, in the background, when the producer first copies from a device.

    Attribute `pinned`: its mapping, in which reservations lie from then on; None before, and if it cannot be had.
    """

    def __init__(self, name: str, committer: Committer, pinnable: Pinnable) -> None:
        self.pinned: Pinned | None = None
        self._name = name
        self._committer = committer
        self._pinnable = pinnable
        self._device: Device | None = None
        self._was_asked = self._is_over = False
        self._changing = threading.Lock()

    def begin(self, index: int) -> None:
        """Have it registered for that CUDA device, once all of it is committed. What fails is one line."""
        memory, nbytes = self._committer.memory, self._pinnable.nbytes
        if self._was_asked or memory is None or not 0 < nbytes == self._committer.allocator.pinned:
            return
        with self._changing:
            if self._was_asked or self._is_over:
                return
            self._was_asked = True
            try:
                self._device = Device(index)
            except (RuntimeError, ValueError) as error:
                self._say(error)
                return
            self._device.pin(memory.backing, self._committer.base, nbytes, self._done, to_write=True)

    def _done(self, result: Pinned | Exception) -> None:
        if isinstance(result, Exception):
            self._say(result)
            return
        with self._changing:
            if not self._is_over:
                self.pinned = result

    def _say(self, error: Exception) -> None:
        logger.warning(
            "the memory of lane %s is not pinned in its producer (%s), so copies from the GPU go by way of"
            " pageable memory, which is slower; make `pinned` smaller, or 0 to silence this",
            *(self._name, str(error)),
        )

    def end(self) -> None:
        """The lane has ended. What tensors lie in stays as it is until the last of them is gone."""
        with self._changing:
            self._is_over = True
            held = [] if self.pinned is None else [self.pinned]
            self.pinned = None
        if self._device is not None:
            if held:
                self._device.drop(held)
            self._device.stop()
