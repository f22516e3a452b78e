"""The lane: a ticket in the feature's place.

`Producer` is a tokenizer's end; a scheduler's is in `rank`. Neither does anything before the first large feature:
an engine that serves text only has no lane.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

import torch

from mmlane.lane import (
    Invitation,
    Lane,
    LaneUnavailable,
    Refused,
    StaleHere,
    TicketError,
    UnknownLane,
    memory,
)
from mmlane.log import guarded, logger
from mmlane.transport.base import (
    Declined,
    Here,
    LostFeature,
    Ownership,
    Payload,
    Receiver,
    Tokenizer,
    Transport,
)
from mmlane.transport.rank import Rank
from mmlane.transport.samples import Samples, Shared

OPENING_S = 60.0  # after which a lane that has not opened is worth a line

# How a tokenizer's lane is. off: this launch has none, or it was switched off; unused: no large feature has been
# sent yet; opening: not all ranks have joined; failed: it could not be made, or has ended.
State = Literal["off", "unused", "opening", "open", "failed"]
STATES: tuple[State, ...] = get_args(State)
_STATES: dict[str, State] = {"waiting": "opening", "open": "open", "off": "off", "closed": "failed"}


class Ticket(Payload):
    """A ticket for a tensor in a lane: made by a `Producer`, taken by a `Rank`, passed on by other processes."""

    kind = "ticket"
    lends = True

    def __init__(self, ticket: bytes, end: Producer | Rank | None, shared: Shared | None = None) -> None:
        """shared: what is known of the copy that it is for, where there are more tickets on it."""
        self.ticket = ticket
        self.shared = shared
        self._end = end
        self._taken: torch.Tensor | None = None
        is_passed_on = end is None or (isinstance(end, Rank) and end.passes_on)
        self.ownership = Ownership.DONE if is_passed_on else Ownership.OURS

    def state(self) -> dict[str, Any]:
        if self.ownership is Ownership.OURS and isinstance(self._end, Producer):
            self.ownership = Ownership.SENT  # a rank owes it, whatever it passes on to its peers
        return {"ticket": self.ticket, **(self.shared._asdict() if self.shared else {})}

    def take(self) -> torch.Tensor:
        """As `Rank.take`, whose `TicketError` becomes a `LostFeature` unless it is `StaleHere`."""
        if self._taken is None:
            try:
                if not isinstance(self._end, Rank):
                    raise UnknownLane("this process is no rank of the lane's engine")
                self._taken = self._end.take(self.ticket)
            except StaleHere:
                raise
            except TicketError as error:
                raise LostFeature(
                    f"multimodal features are lost: {error}. Only this request fails; send it again"
                ) from error
            self.ownership = Ownership.DONE
        return self._taken

    def peek(self) -> torch.Tensor | None:
        return self._taken

    def may_be_kept(self) -> bool:
        return not isinstance(self._end, Rank) or self._end.holds_little(self.ticket)

    def release(self) -> None:
        ownership, self.ownership = self.ownership, Ownership.DONE
        if ownership is not Ownership.DONE and self._end is not None:
            self._end.release(self.ticket, sent=ownership is Ownership.SENT)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # else the lane goes with the process
            self._release_if_ours()

    def _release_if_ours(self) -> None:
        if getattr(self, "ownership", None) is Ownership.OURS:
            self.release()


class LaneTransport(Transport):
    """Carries what is plain and dense, once all ranks have joined and while there is room."""

    payload = Ticket
    where = "put"
    consequence = "the feature goes by a shared-memory segment"

    def __init__(self, here: Here) -> None:
        self.producer = Producer(here) if isinstance(here, Tokenizer) else None
        self.rank = Rank(here) if isinstance(here, Receiver) else None

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Ticket | Declined:
        return Declined("no lane") if self.producer is None else self.producer.put(tensor, samples)

    def receive(self, state: Mapping[str, Any]) -> Ticket:
        shared = Shared(state["copy"], state["more"]) if "copy" in state else None
        return Ticket(state["ticket"], self.rank, shared)

    def join(self, invitation: bytes) -> None:
        if self.rank is not None:
            self.rank.notice(Invitation.parse(invitation))


class Producer:
    """The lane of a tokenizer; made with the first large feature, closed when the tokenizer is let go."""

    def __init__(self, here: Tokenizer) -> None:
        self._here = here
        self._pid = os.getpid()
        self._lane: Lane | None = None
        self._tried = False
        self._failed = False
        self._warned: set[str] = set()

    def put(self, tensor: torch.Tensor, samples: Samples | None = None) -> Ticket | Declined:
        """A ticket for a tensor; Declined with the invitation that readers still have to get, if they have to."""
        lane = self._lane if self._tried else self._open()
        if lane is None or os.getpid() != self._pid:
            return Declined("unavailable")
        ticket, shared = (lane.put(tensor, in_place=True), None) if samples is None else samples.put(lane, tensor)
        if isinstance(ticket, bytes):
            try:
                return Ticket(ticket, self, shared)
            except BaseException:
                self.release(ticket, sent=False)
                raise
        if ticket.cause == "not_open":
            return Declined(ticket.cause, bytes(lane.invitation))
        self._warn(
            ticket.cause,
            f"the lane has no place for a feature ({ticket.cause}): {ticket.detail}. It goes by a shared-memory"
            " segment, as do others like it; said once per cause, `mmlane status` counts them",
        )
        return Declined(ticket.cause)

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Room in the lane for a tensor on a GPU, to be copied there and then put; None if there is none now.

        For any thread; so the lane is not made here, but where the first feature is put.
        """
        if (lane := self.lane) is None:
            return None
        room = lane.reserve(tensor.shape, tensor.dtype, counts=False)
        return None if isinstance(room, Refused) else room.tensor

    def pin(self, device: int) -> None:
        """Have the lane pinned in this process, too, for copies from that GPU."""
        if (lane := self.lane) is not None:
            lane.pin(device)

    def release(self, ticket: bytes, *, sent: bool) -> None:
        """Release a ticket that no rank will take, sent without effect or never sent. For finalizers, too."""
        if (lane := self.lane) is not None:
            (lane.recall if sent else lane.withdraw)(ticket)

    @property
    def lane(self) -> Lane | None:
        """The lane, when there is one in this process."""
        return self._lane if os.getpid() == self._pid else None

    def _open(self) -> Lane | None:
        self._tried = True
        try:
            here = self._here
            capacity = here.capacity or memory.default_capacity()
            pinned = min(here.pinned, capacity)  # the lane itself refuses more
            if pinned < here.pinned:
                logger.info(
                    "all %d MiB of the lane are pinned: MMLANE_PINNED_MB is %d, by setting or by default,"
                    " and the lane's capacity (MMLANE_CAPACITY_MB) is less",
                    *(capacity >> 20, here.pinned >> 20),
                )
            self._lane = Lane(here.readers, capacity=capacity, pinned=pinned)
        except LaneUnavailable as error:
            self._do_without(error)
            return None
        finally:
            self._failed = self._lane is None
        # In a thread: the garbage collector may run this where the lane's lock is held.
        weakref.finalize(self, _in_a_thread, self._lane.close).atexit = False
        _in_a_thread(_see_it_open, self._lane, self._here.watch)
        return self._lane

    def try_out(self) -> None:
        """Say now whether there can be a lane here, instead of at the first large feature. Leaves nothing."""
        try:
            memory.attempt(self._here.capacity or memory.default_capacity())
        except LaneUnavailable as error:
            self._do_without(error)

    @property
    def state(self) -> State:
        """How the lane is."""
        if self._failed:
            return "failed"
        if self._lane is None:
            return "unused"
        return _STATES[self._lane.state]

    def _do_without(self, error: LaneUnavailable) -> None:
        self._tried = self._failed = True
        capacity = self._here.capacity
        size = "unset" if capacity is None else capacity >> 20
        self._warn(
            "unavailable",
            f"no lane here: {error}. Features go by shared-memory segments instead; MMLANE_CAPACITY_MB"
            f" (here {size}) sets the size, MMLANE=backport silences this",
        )

    def _warn(self, cause: str, line: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            logger.warning("%s", line)


def _in_a_thread(work: Callable[..., None], *args: Any) -> None:
    with suppress(RuntimeError):  # no thread to be had: a line is missing, or a lane stays until the process ends
        threading.Thread(target=work, args=args, name="mmlane-lane", daemon=True).start()


def _see_it_open(lane: Lane, watch: Callable[[Lane], None] | None) -> None:
    """Log when a lane opens, and once if that takes long. Holds no producer, which may be collected."""
    if watch is not None:
        with guarded("metrics", "the lane is not in /metrics"):
            watch(lane)
    with guarded("watching the lane", "nothing is said when it opens"):
        _wait(lane)


def _wait(lane: Lane) -> None:
    ranks = " + ".join(str(count) for count in lane.expected.values())
    began = time.monotonic()
    late = (
        "the lane has not opened within %.0f s, because not all of its %s readers have joined it;"
        " features go by shared-memory segments until it does; `mmlane status` tells which is missing, the"
        " log of that rank why, and MMLANE=backport silences this"
    )
    if wait_open(lane, late, OPENING_S, ranks):
        logger.info(
            "the lane is open: %s readers, %.1f GiB of room, %.1f s after the first feature",
            *(ranks, lane.stats().capacity_bytes / 2**30, time.monotonic() - began),
        )


def wait_open(lane: Lane, late: str, *args: object) -> bool:
    """Whether a lane has opened, or has ended before that; `late` is the line to log, once, if it takes long."""
    is_logged = False
    while not lane.wait_open(OPENING_S):
        if lane.is_closed:
            return False
        if not is_logged and lane.state != "off":
            is_logged = True
            logger.warning(late, *args)
    return True
