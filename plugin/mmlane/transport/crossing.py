"""The bytes of features cross to every other node once: from the first rank, by a chain of leaders.

A leader is the lowest rank of a node that is not the first rank's; it receives into a lane of its node's own. Both
ends work in a thread, so the engine's scheduler is not held up. What they say, over a `Wire`:

first rank (0)                     leaders (1, 2, ...)
                               <-  the invitation to the node's lane; None where it can have none
                               <-  OPEN                   all ranks of the node have joined, or there is no lane
pieces, numbers to let go      ->                         to each
chunks of the pieces' bytes    ->                         to 1, which passes them on to 2, and so on
                               <-  landed                 a ticket, the number of a leader's copy, or None

Gloo fills a larger buffer in part, and aborts the process for a smaller one; so both ends cut the bytes by one
rule (`_chunks`).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Literal, NamedTuple

import torch

from mmlane.lane import Lane, LaneUnavailable, Refused
from mmlane.lane.reservation import Reservation
from mmlane.log import failed, guarded, logger
from mmlane.transport.lane import OPENING_S, wait_open
from mmlane.transport.wire import ANY_TIME, PATIENCE, Moving, Wire, bytes_of

CHUNK = 4 << 20  # bytes that a leader has received before it passes them on
AHEAD = 4  # chunks that may be on their way to a leader, and from it
HEARTBEAT_S = 30.0  # between two messages, at most
OPEN = "open"
_LATE = (
    "the lane for features from another node has not opened within %.0f s, because not all of its ranks"
    " have joined it: features go to all nodes inside of their requests until it does; `mmlane status` on this"
    " node tells which rank is missing, the log of that rank why"
)

Room = Reservation | torch.Tensor | None  # where a leader receives a piece; nowhere for want of memory
Landed = bytes | int | None  # where it is then: a ticket, the number of a leader's copy, or lost there


class Piece(NamedTuple):
    """One feature: its number, dtype and shape. comes: whether its bytes do; else they have come before.

    is_kept: whether more tickets for the same bytes will be asked for.
    """

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    comes: bool
    is_kept: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(eq=False)
class Crossing:
    """Features on their way. tensors: those of the pieces that come, contiguous. let_go: numbers, kept till now.

    landed: by node, of each piece where it is; None if the link broke first. Valid once it `is_over`.
    """

    pieces: list[Piece] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)
    landed: dict[str, list[Landed]] | None = None
    is_over: bool = False


class Departure:
    """The first rank's end.

    nodes: the others, in the order of the chain. wire: makes the wire, and may wait for the others. wake: called
    when something is over. count_bytes: told what was "sent". state: opening until all lanes are open.
    invitations: by node, to its lane, once known.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        wire: Callable[[], Wire],
        wake: Callable[[], None],
        count_bytes: Callable[[str, int], None],
    ) -> None:
        self.nodes = list(nodes)
        self.state: Literal["opening", "open", "broken"] = "opening"
        self.invitations: dict[str, bytes] = {}
        self._make = wire
        self._wake, self._count_bytes = wake, count_bytes
        self._waiting: queue.SimpleQueue[Crossing] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="mmlane-departure", daemon=True).start()

    def send(self, crossing: Crossing) -> None:
        """Put it on its way; it is over at once if the link is broken."""
        self._waiting.put(crossing)
        if self.state == "broken":
            self._give_up()

    def _run(self) -> None:
        try:
            wire = self._make()
            for end, node in enumerate(self.nodes, start=1):
                invitation = wire.receive_object(end)
                if invitation is not None:
                    self.invitations[node] = invitation
            for end, _ in enumerate(self.nodes, start=1):
                wire.receive_object(end)
            self.state = "open"
            logger.info("features cross to the other %d nodes once each from now on", len(self.nodes))
            while True:
                self._carry(wire, self._next())
        except Exception as error:  # noqa: BLE001 - whatever it is: no thread may end unseen
            failed(
                "nodes",
                error,
                "features go to other nodes inside of their requests, to each rank, until the engine is restarted",
            )
            self.state = "broken"
            self._give_up()

    def _next(self) -> Crossing:
        """What is to be sent; nothing now and then, so that a broken link is noticed before it is needed."""
        try:
            return self._waiting.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            return Crossing()

    def _carry(self, wire: Wire, crossing: Crossing) -> None:
        try:
            crossing.landed = self._landed(wire, crossing)
        finally:
            crossing.is_over = True
            self._wake()

    def _landed(self, wire: Wire, crossing: Crossing) -> dict[str, list[Landed]]:
        ends = dict(enumerate(self.nodes, start=1))
        for end in ends:
            wire.send_object(end, (crossing.pieces, crossing.let_go))
        chunks = [chunk for tensor in crossing.tensors for chunk in _chunks(tensor.nbytes, bytes_of(tensor))]
        for moving in [wire.send(1, chunk) for chunk in chunks]:
            moving.wait(PATIENCE)
        with guarded("metrics", "bytes between nodes are missing in /metrics"):
            self._count_bytes("sent", sum(tensor.nbytes for tensor in crossing.tensors))
        return {node: wire.receive_object(end, PATIENCE) for end, node in ends.items()}

    def _give_up(self) -> None:
        while True:
            try:
                crossing = self._waiting.get_nowait()
            except queue.Empty:
                break
            crossing.is_over = True
        self._wake()


class Landing:
    """A leader's end: receives into the lane of its node.

    end: its number on the wire, of `ends`. wire, lane: make what their names say; the first may wait for the other
    ends. copies: where a piece is put, under a number of this leader's own, if the lane has no room for it.
    count_bytes: told what has been "received", and "sent" on.
    """

    def __init__(
        self,
        end: int,
        ends: int,
        wire: Callable[[], Wire],
        lane: Callable[[], Lane],
        copies: dict[int, torch.Tensor],
        count_bytes: Callable[[str, int], None],
    ) -> None:
        self._end, self._ends = end, ends
        self._count_bytes = count_bytes
        self._make_wire, self._make_lane = wire, lane
        self._copies = copies
        self._numbers = itertools.count()
        self._lane: Lane | None = None
        self._kept: dict[int, Reservation] = {}
        threading.Thread(target=self._run, name="mmlane-landing", daemon=True).start()

    def _run(self) -> None:
        try:
            wire = self._make_wire()
            try:
                self._lane = self._make_lane()
            except LaneUnavailable as error:
                logger.warning(
                    "no lane for features from another node: %s. This rank receives them into its own"
                    " memory, and sends a copy to each other rank here; MMLANE_CAPACITY_MB sets a lane's size",
                    error,
                )
            # The first rank listens to one end after the other.
            wire.send_object(0, None if self._lane is None else bytes(self._lane.invitation), ANY_TIME)
            if self._lane is not None:
                wait_open(self._lane, _LATE, OPENING_S)
            wire.send_object(0, OPEN, ANY_TIME)
            while True:
                pieces, let_go = wire.receive_object(0)
                for number in let_go:
                    self._kept.pop(number, None)
                self._tell(wire, self._land(wire, pieces))
        except Exception as error:  # noqa: BLE001 - whatever it is: no thread may end unseen
            failed("nodes", error, "this node is sent features inside of their requests, to each rank")
            self._kept.clear()
            if self._lane is not None:
                self._lane.close()  # what the first rank was told of can be taken for a while

    def _tell(self, wire: Wire, landed: list[Landed]) -> None:
        try:
            wire.send_object(0, landed)
        except BaseException:
            for number in landed:
                if isinstance(number, int):
                    self._copies.pop(number, None)  # no rank will ask for it
            raise

    def _land(self, wire: Wire, pieces: list[Piece]) -> list[Landed]:
        rooms = [self._room(piece) if piece.comes else None for piece in pieces]
        self._receive(
            wire, [(piece.nbytes, room) for piece, room in zip(pieces, rooms, strict=True) if piece.comes]
        )
        return [self._landed(piece, room) for piece, room in zip(pieces, rooms, strict=True)]

    def _room(self, piece: Piece) -> Room:
        """Where the bytes of a piece go: into the lane, else into memory, else nowhere."""
        if self._lane is not None:
            room = self._lane.reserve(piece.shape, piece.dtype)
            if not isinstance(room, Refused):
                return room
        return _memory(piece.shape, piece.dtype)

    def _receive(self, wire: Wire, rooms: list[tuple[int, Room]]) -> None:
        """Fill them, and pass their bytes on to the next leader as they come in."""
        coming: deque[tuple[torch.Tensor, Moving]] = deque()
        leaving: deque[tuple[torch.Tensor, Moving]] = deque()
        chunks = (chunk for nbytes, room in rooms for chunk in _chunks(nbytes, _bytes_in(room)))
        is_last = self._end + 1 == self._ends
        for chunk in chain(chunks, [None] * AHEAD):
            if chunk is not None:
                coming.append((chunk, wire.receive(self._end - 1, chunk)))
            if coming and (chunk is None or len(coming) > AHEAD):
                filled, moving = coming.popleft()
                moving.wait(PATIENCE)
                if not is_last:
                    leaving.append((filled, wire.send(self._end + 1, filled)))
            while len(leaving) > AHEAD or (chunk is None and leaving and not coming):
                leaving.popleft()[1].wait(PATIENCE)
        total = sum(nbytes for nbytes, _ in rooms)
        with guarded("metrics", "bytes between nodes are missing in /metrics"):
            self._count_bytes("received", total)
            if not is_last:
                self._count_bytes("sent", total)

    def _landed(self, piece: Piece, room: Room) -> Landed:
        if not piece.comes:
            room = self._kept.pop(piece.number, None)
        if not isinstance(room, Reservation):
            return self._keep_copy(room)
        ticket = room.publish()
        if isinstance(ticket, Refused):  # the lane was closed or switched off since, say
            kept = _memory(piece.shape, piece.dtype)
            return self._keep_copy(None if kept is None else kept.copy_(room.tensor))
        if piece.is_kept:
            self._kept[piece.number] = room
        else:
            room.close()
        return ticket

    def _keep_copy(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        number = next(self._numbers)
        self._copies[number] = tensor
        return number


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    except (MemoryError, RuntimeError):  # torch's, for want of memory
        return None


def _bytes_in(room: Room) -> torch.Tensor | None:
    tensor = room.tensor if isinstance(room, Reservation) else room
    return None if tensor is None else bytes_of(tensor)


def _chunks(nbytes: int, data: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The parts in which `nbytes` cross: of `data`, else of memory that goes when they have been passed on."""
    for begin in range(0, nbytes, CHUNK):
        size = min(CHUNK, nbytes - begin)
        yield torch.empty(size, dtype=torch.uint8, device="cpu") if data is None else data[begin : begin + size]
