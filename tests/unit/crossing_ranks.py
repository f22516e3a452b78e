"""Ranks of several nodes, each a process: what the tests of the link have them do.

A rank obeys a test: it is told a function of this file by `ask`, calls it with itself, and says what it returned.
"""

from __future__ import annotations

import logging
import os
import queue
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from mmlane.lane import Invitation, Lane, LaneUnavailable, Reader
from mmlane.transport import crossing, leader_copy
from mmlane.transport.crossing import Crossing, Departure, Landed, Landing, Piece
from mmlane.transport.leader_copy import LeaderCopy, LeaderCopyTransport
from mmlane.transport.wire import TorchWire, Wire
from tests.lane.harness.child import Child
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import DEADLINE, eventually

P = ParamSpec("P")
T = TypeVar("T")
MIB = 1 << 20
GROUP = "dp0"
dist: Any = torch.distributed

Looks = tuple[tuple[int, ...], torch.dtype, int]  # of a tensor of random bytes: shape, dtype, seed


class Process:
    """A rank: what it has, and what it has logged."""

    def __init__(self, pipe: Connection, rank: int, world: int) -> None:
        self.pipe, self.rank, self.world = pipe, rank, world
        self.lines: list[str] = []
        self.counted: Counter[str] = Counter()
        # As the first rank:
        self.departure: Departure | None = None
        self.over: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.crossings: list[Crossing] = []
        # As a leader:
        self.copies: dict[int, torch.Tensor] = {}
        self.landing: Landing | None = None
        self.lane: Lane | None = None
        self.reader: Reader | None = None
        self.taken: dict[bytes, torch.Tensor] = {}
        # Without a link:
        self.line: Wire | None = None

    def count(self, direction: str, count: int) -> None:
        self.counted[direction] += count

    def wire(self) -> Wire:
        return TorchWire(range(self.world))


class Lines(logging.Handler):
    """Keeps what mmlane says in a rank."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def live(pipe: Connection, rank: int, world: int, port: int) -> None:
    """A rank's life: does as it is told."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    this = Process(pipe, rank, world)
    said = logging.getLogger("mmlane")
    said.setLevel(logging.INFO)
    said.addHandler(Lines(this.lines))
    while True:
        function, args = pipe.recv()
        pipe.send(("done", function(this, *args)))


@contextmanager
def ranks(world: int) -> Iterator[list[Child]]:
    """As many ranks, each with the default group, and torch's store in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as scope:
        yield [scope.enter_context(Child(live, rank, world, store.port)) for rank in range(world)]


def tell(rank: Child, function: Callable[Concatenate[Process, P], T], *args: P.args, **_: P.kwargs) -> None:
    """Have a rank begin to do something."""
    rank.say((function, args))


def hear(rank: Child) -> Any:
    """What the function returned that a rank was told to call."""
    word, value = rank.hear()
    assert word == "done", (word, value)
    return value


def ask(rank: Child, function: Callable[Concatenate[Process, P], T], *args: P.args, **_: P.kwargs) -> T:
    """Have a rank do something."""
    rank.say((function, args))
    value: T = hear(rank)
    return value


# --- the first rank -----------------------------------------------------------------------------------------


def depart(this: Process, nodes: list[str]) -> None:
    """Begin to make the link."""
    this.departure = Departure(nodes, this.wire, lambda: this.over.put(None), this.count)


def _departure(this: Process) -> Departure:
    assert this.departure is not None
    return this.departure


def invited(this: Process, nodes: list[str]) -> dict[str, bytes]:
    """Wait for the invitations of these nodes."""
    departure = _departure(this)
    eventually(lambda: set(nodes) <= set(departure.invitations), "the invitations are there")
    return dict(departure.invitations)


def state(this: Process) -> str:
    return _departure(this).state


def opened(this: Process) -> str:
    """Wait for the end of opening: the state then."""
    departure = _departure(this)
    eventually(lambda: departure.state != "opening", "the link has opened, or cannot")
    return departure.state


def broken(this: Process) -> str:
    departure = _departure(this)
    eventually(lambda: departure.state == "broken", "the link is broken")
    return departure.state


def send(this: Process, pieces: list[Piece], come: list[Looks], let_go: list[int]) -> int:
    """Put a crossing on its way; returns its number."""
    crossing = Crossing(pieces, [random(*looks) for looks in come], let_go)
    this.crossings.append(crossing)
    _departure(this).send(crossing)
    return len(this.crossings) - 1


def end(this: Process, number: int) -> dict[str, list[Landed]] | None:
    """Wait until a crossing is over: where its pieces have landed."""
    crossing = this.crossings[number]
    while not crossing.is_over:
        this.over.get(timeout=DEADLINE)
    return crossing.landed


def is_over(this: Process, number: int) -> bool:
    """Whether a crossing is, without waiting."""
    return this.crossings[number].is_over


def said(this: Process) -> list[str]:
    return list(this.lines)


def counts(this: Process) -> dict[str, int]:
    return dict(this.counted)


# --- leaders ------------------------------------------------------------------------------------------------


def land(this: Process, capacity: int | None, segment: int | None = None) -> None:
    """Begin to receive into a lane of this size; None: there can be none."""

    def make() -> Lane:
        if capacity is None:
            raise LaneUnavailable("none to be had")
        this.lane = Lane({GROUP: 1}, capacity=capacity, **({} if segment is None else {"segment": segment}))
        return this.lane

    this.landing = Landing(this.rank, this.world, this.wire, make, this.copies, this.count)


def join(this: Process, invitation: bytes) -> None:
    """Be the node's only reader."""
    this.reader = Reader(GROUP, 0)
    this.reader.join(Invitation.parse(invitation), DEADLINE)


def without_memory(this: Process) -> None:
    """From now on there is no memory but the lane's."""
    crossing._memory = lambda shape, dtype: None


def take(this: Process, ticket: bytes, looks: Looks) -> bool:
    """Take a ticket, and keep the tensor: whether it is as it was sent, bit for bit."""
    assert this.reader is not None
    this.taken[ticket] = this.reader.take(ticket)
    return same(this.taken[ticket], random(*looks))


def drop(this: Process) -> None:
    """Let go of all tensors that were taken."""
    this.taken.clear()


def extents(this: Process, wanted: int) -> int:
    """How many tensors the lane holds, once it is as many as wanted."""
    lane = this.lane
    assert lane is not None

    def held() -> bool:
        lane.drain()
        return lane.stats().extents == wanted

    eventually(held, f"the lane holds {wanted}")
    return lane.stats().extents


def holds(this: Process) -> int:
    """How many tensors the lane holds now."""
    assert this.lane is not None
    this.lane.drain()
    return this.lane.stats().extents


def has_copy(this: Process, number: int, looks: Looks) -> bool:
    """Whether this leader has kept a copy of a tensor, bit for bit."""
    return same(this.copies[number], random(*looks))


def numbers_of_copies(this: Process) -> list[int]:
    return sorted(this.copies)


def stand_before_the_bytes(this: Process) -> None:
    """From now on say when a header has come, and do nothing more."""

    def receive(*_: Any) -> None:
        this.pipe.send(("done", "header"))
        queue.SimpleQueue[None]().get()

    setattr(Landing, "_receive", receive)  # noqa: B010 - mypy minds that it never returns


# --- a wire alone -------------------------------------------------------------------------------------------


def connect(this: Process) -> None:
    this.line = this.wire()


def say_to(this: Process, to: int, messages: list[Any]) -> None:
    assert this.line is not None
    for message in messages:
        this.line.send_object(to, message)


def hear_from(this: Process, source: int, count: int) -> list[Any]:
    assert this.line is not None
    return [this.line.receive_object(source) for _ in range(count)]


def hear_the_end(this: Process, source: int) -> str:
    """Receive from a rank that ends without sending: what receiving raises, or what was received."""
    assert this.line is not None
    try:
        return f"heard {this.line.receive_object(source)!r}"
    except RuntimeError:
        return "RuntimeError"


def sends(this: Process, to: int, sizes: list[int]) -> None:
    """Send raw bytes, all at once."""
    assert this.line is not None
    sent = [random((size,), seed=size) for size in sizes]
    for moving in [this.line.send(to, data) for data in sent]:
        moving.wait()


def receives(this: Process, source: int, sizes: list[int]) -> list[bool]:
    """Receive raw bytes, all at once: whether each are what was sent."""
    assert this.line is not None
    filled = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for moving in [this.line.receive(source, data) for data in filled]:
        moving.wait()
    return [same(data, random((size,), seed=size)) for data, size in zip(filled, sizes, strict=True)]


# --- copies of a leader -------------------------------------------------------------------------------------


def hand_over(this: Process, key: int, looks: list[Looks]) -> list[bool]:
    """Each tensor from rank 0's memory to all: whether it is there, and a second look finds the same."""
    leader_copy._group = lambda: dist.group.WORLD
    kept = {key + n: random(*one) for n, one in enumerate(looks)} if this.rank == 0 else {}
    answers = []
    for n, one in enumerate(looks):
        state = {"key": key + n, "ranks": list(range(this.world)), "shape": one[0], "dtype": one[1]}
        payload = LeaderCopy(state, kept)
        assert payload.state() == state and payload.peek() is None
        tensor = payload.take()
        answers.append(same(tensor, random(*one)) and payload.take() is tensor and payload.peek() is tensor)
    assert kept == {}
    return answers


def drop_copies(this: Process) -> list[int]:
    """Release one of two, twice; what is left."""
    transport = LeaderCopyTransport(None)  # type: ignore[arg-type]
    transport.kept.update({1: torch.ones(1), 2: torch.ones(2)})
    payload = transport.receive({"key": 1, "ranks": [0, 1], "shape": (1,), "dtype": torch.float32})
    payload.release()
    payload.release()
    return sorted(transport.kept)
