"""Where requests wait for their features to cross to other nodes, before they are broadcast.

Once all ranks are known (`nodes`), a pointer travels with a state for each node (`ShmPointerMMData.by_node`), and
features cross to every other node once (`crossing`). Requests wait for that at the `Gate`, in order, while the
engine goes on with those that it has.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from mmlane.engine.requests import id_of
from mmlane.lane.ticket import read
from mmlane.log import guarded, logger
from mmlane.transport.agreement import Arrival, arrivals, end_on_error, move_out_of_batches, taker
from mmlane.transport.base import LostFeature
from mmlane.transport.chain import KIND
from mmlane.transport.crossing import Crossing, Departure, Landed, Piece
from mmlane.transport.inline import Inline, compact
from mmlane.transport.lane import Ticket
from mmlane.transport.leader_copy import LeaderCopy
from mmlane.transport.nodes import Node, Route, find_route
from mmlane.transport.pointer import ShmPointerMMData, is_pointer
from mmlane.transport.wire import TorchWire

LOOK_S = 2.0  # between two looks after ranks that have not announced themselves
LATE_S = 30.0  # after which that is worth a line
KEPT_S = 30.0  # for which bytes that crossed are kept for samples that were promised


@dataclass(eq=False)
class Waiting:
    """A message of the engine, perhaps a batch of requests, until it is broadcast.

    arrived: its requests with pointers. pieces: which of a crossing's pieces a pointer is, by its id.
    """

    message: Any
    arrived: list[Arrival] = field(default_factory=list)
    crossing: Crossing | None = None
    pieces: dict[int, int] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.crossing is None or self.crossing.is_over

    def pointers(self) -> list[ShmPointerMMData]:
        return [pointer for arrival in self.arrived for pointer in arrival.pointers()]


@dataclass
class Known:
    """A copy that has crossed, and is kept at the leaders for more samples. until: seconds, monotonic."""

    number: int
    until: float


class Gate:
    """Where requests wait before they are broadcast; stands in for the engine's `input_blocker`, which it calls.

    ranks: those that receive the same requests, this one first; numbers in the default group. node: this rank's.
    answer: tells the tokenizer that a request has failed, and why. count_bytes: told what went to other nodes.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        node: str,
        then: Any,
        answer: Callable[[Any, str], None],
        count_bytes: Callable[[str, int], None],
    ) -> None:
        self._ranks, self._node, self._then, self._answer = ranks, node, then, answer
        self._count_bytes = count_bytes
        self._waiting: deque[Waiting] = deque()
        self._numbers = count()
        self._known: dict[Any, Known] = {}  # by the copy's lane, number, dtype and shape
        self._route: Route | None = None
        self._departure: Departure | None = None
        self._next_look = time.monotonic()
        self._late_from = self._next_look + LATE_S
        self._warned = False
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable when a crossing is over
        self._was_woken = False

    def handle(self, received: list[Any] | None) -> list[Any] | None:
        """The messages to broadcast now, of those received now and before; None in a rank that receives none."""
        if self._then is not None:
            received = self._then.handle(received)
        if self._was_woken:
            self._was_woken = False
            with suppress(BlockingIOError):  # woken twice, and one read was enough for both
                os.eventfd_read(self.wakeup)
        if received is None or not (received or self._waiting or self._known):
            return received
        with end_on_error():
            return self._passed(received)

    def _passed(self, received: list[Any]) -> list[Any]:
        for message in received:
            self._waiting.append(self._admitted(message))
        if self._known:
            self._let_go([key for key, known in self._known.items() if known.until < time.monotonic()])
        passed: list[Any] = []
        while self._waiting and self._waiting[0].is_over:
            waiting = self._waiting.popleft()
            if waiting.arrived:
                passed += self._ready(waiting)
            else:
                passed.append(waiting.message)
        return passed

    def _admitted(self, message: Any) -> Waiting:
        """A message that has come: its features begin to cross, if there is a way to the other nodes."""
        waiting = Waiting(message, arrivals([message]))
        if waiting.arrived:
            with guarded("nodes", "this request's features go to the other nodes inside of it, to each rank"):
                if self._departure is None:
                    self._find_route()
                if self._departure is not None and self._departure.state == "open":
                    self._send(waiting, self._departure)
                elif self._departure is not None and self._departure.state == "opening":
                    self._warn_if_late("the lane of another node has not opened; the log of its ranks tells why")
        return waiting

    def _find_route(self) -> None:
        """Have a way to the other nodes, once all ranks are there."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        route = find_route(self._ranks)
        if route is None:
            self._warn_if_late(
                "not all ranks run mmlane in mode lane; install it on each node, with the same settings"
            )
            return
        self._route = route
        leaders = [node.ranks[0] for node in route]
        names = [node.name for node in route[1:]]
        self._departure = Departure(names, lambda: TorchWire(leaders), self._wake, self._count_bytes)
        self._late_from = now + LATE_S

    def _warn_if_late(self, why: str) -> None:
        if time.monotonic() > self._late_from and not self._warned:
            self._warned = True
            logger.warning("features go to every rank inside of their requests, as without mmlane: %s", why)

    def _wake(self) -> None:
        os.eventfd_write(self.wakeup, 1)
        self._was_woken = True  # after that, so that it is read when it was written

    def _send(self, waiting: Waiting, departure: Departure) -> None:
        """Put the features that came by lane on their way to the other nodes."""
        crossing = Crossing()
        for pointer in waiting.pointers():
            if isinstance(pointer.payload, Ticket) and (tensor := _taken(pointer)) is not None:
                waiting.pieces[id(pointer)] = len(crossing.pieces)
                crossing.pieces.append(self._piece(pointer.payload, tensor, crossing.tensors))
        if crossing.pieces:
            waiting.crossing = crossing
            departure.send(crossing)

    def _piece(self, ticket: Ticket, tensor: torch.Tensor, tensors: list[torch.Tensor]) -> Piece:
        key, more = None, 0
        if ticket.shared is not None:
            lane = read(ticket.ticket).lane
            key, more = (lane, ticket.shared.copy, tensor.dtype, tensor.shape), ticket.shared.more
        known = self._known.pop(key, None)
        number = next(self._numbers) if known is None else known.number
        if known is None:
            tensors.append(tensor)
        if more:
            self._known[key] = Known(number, time.monotonic() + KEPT_S)
        return Piece(number, tensor.dtype, tuple(tensor.shape), comes=known is None, is_kept=more > 0)

    def _let_go(self, keys: list[Any]) -> None:
        numbers = [self._known.pop(key).number for key in keys]
        if numbers and self._departure is not None:
            self._departure.send(Crossing(let_go=numbers))

    def _ready(self, waiting: Waiting) -> list[Any]:
        """A message that goes on, as all ranks can read it; without the requests that have failed by now."""
        if self._route is None or self._departure is None:
            return self._plain(waiting)
        if len(self._route) > 1:
            for pointer in waiting.pointers():
                self._address(pointer, waiting, self._route, self._departure)
        if waiting.crossing is not None:
            self._let_go(self._not_landed(waiting.crossing))
        return [waiting.message]

    def _plain(self, waiting: Waiting) -> list[Any]:
        """For ranks that may be without mmlane: no pointer is left."""
        lost = []
        for arrival in waiting.arrived:
            try:
                for place in arrival.places:
                    place.replace(taker(place, of=is_pointer))
            except LostFeature as error:
                arrival.release()
                lost.append(arrival.request)
                logger.error("request %s: %s", id_of(arrival.request), error)
                self._answer(arrival.request, str(error))
        messages = [waiting.message]
        move_out_of_batches(messages, lost)
        return [message for message in messages if not any(message is request for request in lost)]

    def _address(self, pointer: ShmPointerMMData, waiting: Waiting, route: Route, departure: Departure) -> None:
        """Give a pointer what it is on each node; what cannot be read here stays, and is lost everywhere."""
        payload, tensor = pointer.payload, _taken(pointer)
        if not isinstance(payload, Ticket | Inline) or tensor is None:
            return
        here: dict[str, Any] = {KIND: payload.kind, **payload.state()}
        if pointer.invitation is not None:
            here["invitation"] = pointer.invitation.data
        crossing, piece = waiting.crossing, waiting.pieces.get(id(pointer))
        pointer.by_node = {self._node: here}
        for node in route[1:]:
            landed: Landed = None
            if crossing is not None and crossing.landed is not None and piece is not None:
                landed = crossing.landed[node.name][piece]
            pointer.by_node[node.name] = self._there(node, landed, tensor, departure)

    def _there(self, node: Node, landed: Landed, tensor: torch.Tensor, departure: Departure) -> dict[str, Any]:
        """A pointer's state for another node."""
        if isinstance(landed, bytes):
            return {KIND: Ticket.kind, "ticket": landed}
        if isinstance(landed, int):
            return {KIND: LeaderCopy.kind, "key": landed, "ranks": node.ranks}
        state: dict[str, Any] = {KIND: Inline.kind, "tensor": compact(tensor)}
        if departure.state == "opening":
            state["route"] = self._route
            if node.name in departure.invitations:
                state["invitation"] = departure.invitations[node.name]
        return state

    def _not_landed(self, crossing: Crossing) -> list[Any]:
        """Those of the known bytes that are not in the lane of every node, or of which that is not known."""
        by_piece = zip(*crossing.landed.values(), strict=True) if crossing.landed else [()] * len(crossing.pieces)
        numbers = {
            piece.number
            for piece, landed in zip(crossing.pieces, by_piece, strict=True)
            if not landed or not all(isinstance(one, bytes) for one in landed)
        }
        return [key for key, known in self._known.items() if known.number in numbers]


def _taken(pointer: ShmPointerMMData) -> torch.Tensor | None:
    """The feature, taken; None if it is lost, which it is on all ranks from now on."""
    try:
        return pointer.materialize()
    except LostFeature as error:
        pointer.lost = str(error)
        return None
