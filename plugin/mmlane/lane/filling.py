"""Putting, up to the ticket: an extent is found, memory is committed behind it, and a tensor is copied there."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from mmlane.lane import arguments, failpoints
from mmlane.lane.bookkeeping import Hold
from mmlane.lane.committing import Committer
from mmlane.lane.errors import Refused
from mmlane.lane.guard import Guard
from mmlane.lane.issuing import Issuer
from mmlane.lane.mapping import Owner, copy_tensor, lies_as_it_is
from mmlane.lane.registration import Registration
from mmlane.lane.ticket import unsupported


class Copied(NamedTuple):
    """A copy that was made, and has to be counted."""

    owner: Owner
    nbytes: int
    seconds: float


class Filler:
    """Makes extents, filled or not; called without the lane's lock. An extent goes with the hold that keeps it."""

    def __init__(self, issuer: Issuer, committer: Committer, registration: Registration, guard: Guard) -> None:
        self._issuer = issuer
        self._committer = committer
        self._registration = registration
        self._guard = guard

    def copy(self, tensor: torch.Tensor, hold: Hold) -> Copied | Refused:
        """A copy of a tensor in an extent that the hold keeps. Raises TypeError for what is no tensor."""
        if problem := unsupported(tensor):
            if not isinstance(tensor, torch.Tensor):
                wanted = "a torch.Tensor, like torch.zeros(3, 224, 224)"
                raise arguments.wrong("tensor", tensor, wanted, quoted=False)
            with self._guard.lock, self._guard:
                return self._issuer.refuse("unsupported", problem)
        nbytes = tensor.numel() * tensor.itemsize
        owner = self.reserve(nbytes, hold)
        if isinstance(owner, Refused):
            return owner
        began = time.perf_counter()
        copy_tensor(tensor, nbytes, owner)
        took = time.perf_counter() - began
        failpoints.reached("put.copied")
        return Copied(owner, nbytes, took)

    def reserve(self, nbytes: int, hold: Hold, *, counts: bool = True) -> Owner | Refused:
        """An extent that the hold keeps, with memory behind it. counts: whether a refusal does."""
        with self._guard.lock, self._guard:
            self._issuer.drain_now_and_then()
            place = self._issuer.find(nbytes, hold, counts=counts)
            if isinstance(place, Refused):
                return place
            self._committer.expect(nbytes)
            held = self._committer.memory
        assert held is not None  # it is open
        failpoints.reached("put.allocated")
        # No other thread knows the extent yet, so memory is committed and filled without the lock.
        try:
            self._committer.commit(held, place.uncommitted)
        except OSError as error:
            if error.errno is None:  # a TimeoutError of a signal handler
                raise
            with self._guard.lock, self._guard:
                return self._issuer.refuse("full", f"no memory for {nbytes} bytes: {error}", counts=counts)
        failpoints.reached("put.committed")
        where, pinned = self._committer.base + place.offset, self._registration.pinned
        if pinned is not None and pinned.holds(where, nbytes):
            return pinned.owner(where - pinned.offset, keeps=(pinned, hold))
        return held.mapping.owner(where, keeps=(held.mapping, hold))

    def hold_of(self, tensor: torch.Tensor) -> tuple[Hold, int] | None:
        """What keeps the extent in which a tensor's bytes lie already, and where they lie there."""
        if unsupported(tensor) or not lies_as_it_is(tensor) or not tensor.numel():
            return None
        address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.itemsize
        with self._guard.lock:
            held, pinned = self._committer.memory, self._registration.pinned
            if held is not None and 0 <= (at := address - held.mapping.address) < held.mapping.nbytes:
                return self._issuer.tickets.hold_of(at - self._committer.base, nbytes)
            if pinned is not None and 0 <= (at := address - pinned.address) < pinned.nbytes:
                return self._issuer.tickets.hold_of(at + pinned.offset - self._committer.base, nbytes)
        return None
