"""The pointer class that can carry a ticket: the class that stood there before, and the lane in front of it.

`LanePointer` goes before the engine's class, or ours, in the order of methods. A pointer is one of three things:
a ticket for a tensor in a lane; what it was before, a segment, with the invitation to a lane that is not open yet;
or, where there is no room for a segment either, the tensor itself with such an invitation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mmlane.lane import Invitation, StaleHere, TicketError, UnknownLane
from mmlane_patches import lanes
from mmlane_patches.features import replace_values, single_requests, values
from mmlane_patches.guard import failed, guarded
from mmlane_patches.pointer import made_here, warn_once


@dataclass(frozen=True)
class Sealed:
    """An invitation as it travels, perhaps one of another version of mmlane. `repr` hides the secret in it."""

    data: bytes = field(repr=False)


class LanePointer:
    """A ticket in the feature's place; without one, the class behind this one.

    The attributes are those of a pointer without a ticket, for objects that the engine makes by `__new__`.
    """

    ticket: bytes | None = None
    invitation: Sealed | None = None  # to a lane that readers still have to join
    _inline: torch.Tensor | None = None
    _taken: torch.Tensor | None = None
    _problem: Exception | None = None  # why it could not be unpickled
    _producer: lanes.Producer | None = None
    # Of a ticket: in its producer "fresh", then "pickled" when it may have been sent; in a rank "due"; else nobody
    # has to see to it.
    _state = ""

    # --- made by the producer ---

    def _carry(
        self, ticket: bytes, producer: lanes.Producer, tensor: torch.Tensor, precomputed_hash: int | None
    ) -> None:
        self._describe(tensor.shape, tensor.dtype, precomputed_hash)
        self.ticket, self._producer = ticket, producer
        self._state = "fresh"
        if (made := made_here.get()) is not None:
            made.append(self)

    def _hold(self, tensor: torch.Tensor, precomputed_hash: int | None) -> None:
        self._describe(tensor.shape, tensor.dtype, precomputed_hash)
        self._inline = by_itself(tensor)

    def _describe(self, shape: Any, dtype: Any, precomputed_hash: int | None) -> None:
        self.shape, self.dtype, self.precomputed_hash = shape, dtype, precomputed_hash

    # --- travelling ---

    def __copy__(self) -> LanePointer:
        """The same pointer: a ticket is taken once."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LanePointer:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.ticket is None and self._inline is None:
            state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        else:
            state = {"shape": self.shape, "dtype": self.dtype, "precomputed_hash": self.precomputed_hash}
        if self.ticket is not None:
            state["ticket"] = self.ticket
            if self._state == "fresh":
                self._state = "pickled"
        elif self._inline is not None:
            state["tensor"] = self._inline
        if self.invitation is not None:
            state["invitation"] = self.invitation.data
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Never raises: whoever unpickles is in the middle of a collective with its peers."""
        try:
            self._arrive(dict(state))
        except Exception as error:  # noqa: BLE001 - kept for materialize(), which raises it
            self._problem = error.with_traceback(None)  # whose frames hold the invitation

    def _arrive(self, state: dict[str, Any]) -> None:
        invitation = state.pop("invitation", None)
        self.ticket = state.pop("ticket", None)
        self._inline = state.pop("tensor", None)
        if isinstance(invitation, bytes):
            self.invitation = Sealed(invitation)  # for those that this process passes it on to
        if self.ticket is None and self._inline is None:
            super().__setstate__(state)  # type: ignore[misc]
        else:
            self._describe(state.get("shape"), state.get("dtype"), state.get("precomputed_hash"))
        if lanes.rank is not None:
            self._state = "due"
            if invitation is not None:
                with guarded("join", "this rank is sent features by shared-memory segments"):
                    lanes.rank.notice(Invitation.parse(invitation))

    # --- taking ---

    @property
    def travels_by_lane(self) -> bool:
        """Whether it can be taken without asking the other ranks."""
        return self.ticket is not None or self._inline is not None or self._problem is not None

    def materialize(self) -> torch.Tensor:
        """The feature, on the CPU, as `Rank.take` gives it. Raises `TicketError`, or what a segment raises."""
        if self._problem is not None:
            raise self._problem
        if self._inline is not None:
            return self._inline
        if self.ticket is None:
            tensor: torch.Tensor = super().materialize()  # type: ignore[misc]
            return tensor
        if self._taken is None:
            if lanes.rank is None:
                raise UnknownLane("this process is no rank of the lane's engine")
            self._taken = lanes.rank.take(self.ticket)
            self._state = ""
        return self._taken

    def close_and_unlink(self) -> None:
        """Let go of the feature without taking it."""
        if self.ticket is None:
            if self._inline is None:
                super().close_and_unlink()  # type: ignore[misc]
            return
        state, self._state = self._state, ""
        if state == "fresh" and self._producer is not None:
            self._producer.withdraw(self.ticket)
        elif state == "pickled" and self._producer is not None:
            self._producer.recall(self.ticket)
        elif state == "due" and lanes.rank is not None:
            lanes.rank.discard(self.ticket)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():
            return  # the lane goes with the process; a segment of ours has gone already
        if self.ticket is not None:
            if self._state != "pickled":  # then it is the receiver's
                self.close_and_unlink()
        elif self._inline is None and hasattr(super(), "__del__"):
            super().__del__()  # type: ignore[misc]


class _Choosing(type):
    """Makes a call of the class choose how a tensor travels: inline, by ticket, or as it did before."""

    def __call__(cls, tensor: torch.Tensor, precomputed_hash: int | None = None) -> Any:
        with guarded("inline", "a small feature may be sent with the rest of its storage, which is slower"):
            if tensor.numel() * tensor.itemsize <= lanes.INLINE:
                return by_itself(tensor)
        producer = lanes.producer.get()
        if producer is None:
            return super().__call__(tensor, precomputed_hash)
        ticket, invitation = producer.put(tensor)
        if ticket is not None:
            pointer: Any = cls.__new__(cls)  # type: ignore[call-overload]
            try:
                pointer._carry(ticket, producer, tensor, precomputed_hash)
                return pointer
            except Exception as error:  # noqa: BLE001 - the feature goes another way
                failed("put", error, "the feature goes by a shared-memory segment")
                pointer.ticket = None
                producer.withdraw(ticket)
        try:
            pointer = super().__call__(tensor, precomputed_hash)
        except OSError as error:  # no room: the engine's class says so
            if invitation is None:
                raise
            warn_once(f"errno {error.errno}", error)
            pointer = tensor
        if invitation is not None:
            with guarded("invite", "ranks are invited to the lane with another feature"):
                if not isinstance(pointer, cls):
                    holder: Any = cls.__new__(cls)  # type: ignore[call-overload]
                    holder._hold(tensor, precomputed_hash)
                    pointer = holder
                pointer.invitation = Sealed(bytes(invitation))
        return pointer


def in_front_of(original: type) -> type:
    """The class that takes the place of a pointer class, the engine's or ours, under the same name."""
    choosing = type("Choosing", (_Choosing, type(original)), {})
    body = {"__module__": original.__module__, "__wrapped__": original}
    made: type = choosing(original.__name__, (LanePointer, original), body)
    return made


def by_itself(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, without the rest of its storage, all of which would be pickled."""
    if tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone()


# --- in the scheduler ---------------------------------------------------------------------------------------


def take(requests: list[Any]) -> list[tuple[Any, str]]:
    """Put tensors in the place of the tickets in `requests`; which of them have lost a feature, and why.

    Every rank comes to the same end by itself: a ticket is only issued when all of them have the lane. Raises what
    may be so on this rank alone, `StaleHere` among it.
    """

    def taken(value: Any) -> Any:
        return value.materialize() if isinstance(value, LanePointer) and value.travels_by_lane else value

    lost = []
    for request in single_requests(requests):
        try:
            replace_values(request, taken)
        except StaleHere:
            raise
        except TicketError as error:
            lost.append(
                (request, f"multimodal features are lost: {error}. Only this request fails; send it again")
            )
            lanes.logger.error("mmlane: request %s: %s", getattr(request, "rid", None), lost[-1][1])
            for value in values(request):
                if isinstance(value, LanePointer):
                    value.close_and_unlink()  # also a segment, which the engine's own class leaves when dropped
    return lost
