"""Room in a lane that is kept: for several tickets on one copy, or to be filled from a socket or a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmlane.lane.errors import LaneError, Refused
from mmlane.lane.mapping import lies_as_it_is
from mmlane.lane.ticket import unsupported

if TYPE_CHECKING:
    from mmlane.lane.bookkeeping import Hold
    from mmlane.lane.producer import Lane


class Reservation:
    """Room for one tensor, made by `Lane.reserve`, or with a copy in it by `Lane.copy`; a context manager.

    Publish it as often as you like, in one piece or several.

    Published bytes must not be written to: readers would see it change. The room is free when the reservation is
    closed, no alias of its tensor is left, and all tickets on it have ended. A forked child can fill the room, and
    cannot publish it.
    """

    def __init__(self, lane: Lane, hold: Hold, tensor: torch.Tensor, at: int = 0) -> None:
        self._lane = lane
        self._hold: Hold | None = hold  # the tensor's storage has it, too
        self._tensor: torch.Tensor | None = tensor
        self._begin, self._nbytes = tensor.data_ptr(), tensor.nbytes  # whatever its user has it point to later
        self._at = at  # where it begins in what the hold keeps
        # Torch counts writes to a storage: those to another part of it are not ours to judge.
        self._has_it_all = tensor.nbytes == tensor.untyped_storage().nbytes()
        self._parts: list[tuple[int, int]] = []  # that were published: from, to
        self._writes: int | None = None  # of which torch knew when all of it was published

    @property
    def tensor(self) -> torch.Tensor:
        """The room: contiguous, on the CPU; undefined content if reserved. Raises LaneError once it is closed."""
        if self._tensor is None:
            raise LaneError("this reservation is closed")
        return self._tensor

    def publish(self, part: torch.Tensor | None = None) -> bytes | Refused:
        """A ticket for the tensor, or for a contiguous part of it (a slice, a view, also as another dtype).

        Every call issues another ticket. Returns a Refused as `Lane.put` does. Raises ValueError for what is no
        contiguous part, LaneError if torch has written to the tensor after all of it was published, and in a
        forked child.
        """
        hold, tensor = self._hold, self.tensor  # once, in this order: another thread may close it at any moment
        assert hold is not None  # else it is closed, and there is no tensor
        self._check_unwritten(tensor)
        if part is None:
            part = tensor
        if problem := unsupported(part):
            raise ValueError(problem)
        offset = part.data_ptr() - self._begin if part.numel() else 0  # without elements, it has no place
        if not lies_as_it_is(part) or not 0 <= offset <= self._nbytes - part.nbytes:
            raise ValueError(f"{tuple(part.shape)}, {part.dtype}: not a contiguous part of what was reserved")
        ticket = self._lane.publish(part, hold, self._at + offset)
        if isinstance(ticket, bytes):
            self._parts = _joined([*self._parts, (offset, offset + part.nbytes)])
            if self._has_it_all and self._parts == [(0, self._nbytes)]:
                self._writes = _writes(tensor)
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
        if self._writes not in (None, _writes(tensor)):
            raise LaneError("a tensor was written to after it was published: readers may have seen it change")


def _writes(tensor: torch.Tensor) -> int:
    """How often torch has written to a tensor or to a view of it, where it counts."""
    return 0 if tensor.is_inference() else tensor._version


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few ranges as possible, in order."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found
