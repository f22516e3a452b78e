"""What the samples of one prompt (n > 1) share, and the places of one request: each tensor is copied once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch

from mmlane.lane import Lane, Refused, Reservation
from mmlane.lane.ticket import read

Copy = TypeVar("Copy")


class Shared(NamedTuple):
    """What a ticket is for: a copy, by its first ticket's serial number; and how many more will come."""

    copy: int
    more: int


class Samples:
    """The requests that the engine makes of one with n > 1, all with the same tensors; most often it is just one.

    requests: how many there will be with each tensor. A prompt's first request is answered before the others are
    sent, so a copy has to outlive that one's ticket. It does not live longer than the last of them is sent.
    """

    def __init__(self, requests: int = 1) -> None:
        self._requests = requests
        # By a tensor's id: in how many places of this request it stands, and in how many requests it stood so far.
        self._uses: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()
        # The tensor, its copy, and how many uses are left. The key: how it was copied; the tensor's id, its own
        # while the tensor is kept here; its address, dtype, shape and strides, which can change in place.
        self._copies: dict[Any, tuple[torch.Tensor, Any, int]] = {}

        self._serials: WeakKeyDictionary[Reservation, int] = WeakKeyDictionary()  # of the first ticket on a copy

    def expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """The next request has these: one for each place where a tensor stands."""
        self._uses = Counter(map(id, tensors))
        self._seen.update(self._uses.keys())

    def put(self, lane: Lane, tensor: torch.Tensor) -> tuple[bytes | Refused, Shared | None]:
        """A ticket on the one copy of a tensor, and what is to be known of that if others come."""
        if self._requests == 1 and self._uses[id(tensor)] <= 1:
            return lane.put(tensor, in_place=True), None
        copy, more = self._use(tensor, lane, partial(lane.copy, in_place=True))
        ticket = copy if isinstance(copy, Refused) else copy.publish()
        if isinstance(copy, Refused) or isinstance(ticket, Refused):
            return ticket, None
        return ticket, Shared(self._serials.setdefault(copy, read(ticket).serial), more)

    def copied(self, tensor: torch.Tensor, copy_of: Callable[[torch.Tensor], Copy]) -> Copy:
        """The one copy of a tensor that `copy_of` makes; a `Refused` is none, and is not kept."""
        return self._use(tensor, copy_of, copy_of)[0]

    def _use(
        self, tensor: torch.Tensor, where: Hashable, copy_of: Callable[[torch.Tensor], Copy]
    ) -> tuple[Copy, int]:
        """The copy of a tensor somewhere, and how many more uses of it are to come."""
        key = where, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        kept = self._copies.pop(key, None)
        copy: Copy = copy_of(tensor) if kept is None else kept[1]
        # Those before it may have gone another way, as the first does while the lane is not open.
        requests = self._requests - max(self._seen[id(tensor)], 1) + 1
        left = requests * max(self._uses[id(tensor)], 1) if kept is None else kept[2]
        if left > 1 and not isinstance(copy, Refused):
            self._copies[key] = tensor, copy, left - 1
        return copy, left - 1

    def close(self) -> None:
        """The request has ended, whether it sent all of them or not."""
        self._copies.clear()
