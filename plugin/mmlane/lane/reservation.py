"""Room in a lane that is kept: for several tickets on one copy, or to be filled from a socket or a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmlane.lane.errors import LaneError, Refused

if TYPE_CHECKING:
    from mmlane.lane.bookkeeping import Hold
    from mmlane.lane.producer import Lane


class Reservation:
    """Room for one tensor, made by `Lane.reserve`, or with a copy in it by `Lane.copy`; a context manager.

    Publish it as often as you like, in one piece or several.

    Nobody may write to what was published: readers would see it change. The room is free when the reservation is
    closed, no alias of its tensor is left, and all tickets on it have ended.
    """

    def __init__(self, lane: Lane, hold: Hold, tensor: torch.Tensor) -> None:
        self._lane = lane
        self._hold: Hold | None = hold  # the tensor's storage has it, too
        self._tensor: torch.Tensor | None = tensor
        self._published: int | None = None  # torch's count of writes when all of it was published

    @property
    def tensor(self) -> torch.Tensor:
        """The room: contiguous, on the CPU; undefined content if reserved. Raises LaneError once it is closed."""
        if self._tensor is None:
            raise LaneError("this reservation is closed")
        return self._tensor

    def publish(self, part: torch.Tensor | None = None) -> bytes | Refused:
        """A ticket for the tensor, or for a contiguous part of it (a slice, a view, also as another dtype).

        Every call issues another ticket. Returns a Refused as `Lane.put` does. Raises ValueError for what is no
        contiguous part, LaneError if torch has written to the tensor after all of it was published.
        """
        tensor = self.tensor
        self._check_unwritten(tensor)
        if part is None:
            part = tensor
        offset = part.data_ptr() - tensor.data_ptr()
        if not part.is_contiguous() or not 0 <= offset <= tensor.nbytes - part.nbytes:
            raise ValueError(f"{tuple(part.shape)}, {part.dtype}: not a contiguous part of what was reserved")
        assert self._hold is not None  # it is not closed
        ticket = self._lane.publish(part, self._hold, offset)
        if part.nbytes == tensor.nbytes and isinstance(ticket, bytes):
            self._published = tensor._version
        return ticket

    def close(self) -> None:
        """Give up the room that is not published. Raises LaneError as `publish` does."""
        tensor, self._tensor, self._hold = self._tensor, None, None
        if tensor is not None:
            self._check_unwritten(tensor)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_unwritten(self, tensor: torch.Tensor) -> None:
        if self._published not in (None, tensor._version):
            raise LaneError("a tensor was written to after it was published: readers may have seen it change")
