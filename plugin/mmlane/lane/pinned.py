"""The part of a lane that a reader has registered with CUDA: pinned memory, which has a mapping of its own."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from mmlane.lane.descriptor import Descriptor
from mmlane.lane.mapping import Mapping

if TYPE_CHECKING:
    from mmlane.lane.cuda import Cuda

logger = logging.getLogger("mmlane.lane")


class Pinned(Mapping):
    """A second mapping of the part of a lane that stays committed, registered with CUDA until it dies.

    All else is done with another one: CUDA refuses copies that are registered in part, so a tensor lies in here as
    a whole or not at all. It can be written to until CUDA has it: many drivers refuse to register a read-only
    mapping (cudaDevAttrHostRegisterReadOnlySupported). to_write: also after that, as the producer does.
    """

    def __init__(self, cuda: Cuda, fd: int, offset: int, nbytes: int, *, to_write: bool = False) -> None:
        self._cuda: Cuda | None = None
        self._stays = False
        self.offset = offset
        writable = Descriptor(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        super().__init__(writable.fd, nbytes, offset=offset, writable=True)
        self.populate(0, nbytes)
        cuda.register(self.address, nbytes)
        self._cuda = cuda
        if not to_write:
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
