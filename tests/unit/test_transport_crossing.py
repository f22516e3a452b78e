"""Bytes between nodes: a first rank and the leaders of others, each a process; real gloo, real lanes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest

torch = pytest.importorskip("torch")

from mmlane.transport import crossing  # noqa: E402
from mmlane.transport.crossing import AHEAD, CHUNK, Crossing, Departure, Landed, Piece  # noqa: E402
from mmlane.transport.wire import Wire  # noqa: E402
from tests.lane.harness.child import Child  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402
from tests.unit import crossing_ranks  # noqa: E402
from tests.unit.crossing_ranks import MIB, Looks, ask, hear, ranks, tell  # noqa: E402

SMALL: Looks = (3, 1000), torch.float32, 1
SEGMENT = 64 << 10
TOO_LARGE: Looks = (40, SEGMENT), torch.uint8, 2  # for a lane of 16 segments
ODD: Looks = (CHUNK + 12_345,), torch.uint8, 3

_numbers = count()


def node(number: int) -> str:
    return f"node {number}"


def piece(looks: Looks, *, comes: bool = True, is_kept: bool = False, number: int | None = None) -> Piece:
    shape, dtype, _ = looks
    return Piece(next(_numbers) if number is None else number, dtype, shape, comes, is_kept)


class Link:
    """The first rank, and the leader of each other node."""

    def __init__(self, world: list[Child]) -> None:
        self.first, self.leaders = world[0], world[1:]
        self.nodes = [node(end) for end in range(1, len(world))]

    def open(self, *capacities: int | None) -> None:
        """Make it, with a lane of such a size in each node; None: there can be none."""
        ask(self.first, crossing_ranks.depart, self.nodes)
        for leader, capacity in zip(self.leaders, capacities, strict=True):
            segment = SEGMENT if capacity is not None and capacity < MIB * 2 else None
            ask(leader, crossing_ranks.land, capacity, segment)
        with_lane = [name for name, capacity in zip(self.nodes, capacities, strict=True) if capacity is not None]
        invitations = ask(self.first, crossing_ranks.invited, with_lane)
        for leader, name in zip(self.leaders, self.nodes, strict=True):
            if name in with_lane:
                ask(leader, crossing_ranks.join, invitations[name])
        assert ask(self.first, crossing_ranks.opened) == "open"
        assert sorted(ask(self.first, crossing_ranks.invited, [])) == with_lane

    def send(self, *looks: Looks, pieces: list[Piece] | None = None, let_go: tuple[int, ...] = ()) -> int:
        """Put tensors on their way; the crossing's number."""
        pieces = [piece(one) for one in looks] if pieces is None else pieces
        return ask(self.first, crossing_ranks.send, pieces, list(looks), list(let_go))

    def landed(self, number: int) -> list[list[Landed]]:
        """Where the pieces of a crossing are, of each leader, once it is over."""
        landed = ask(self.first, crossing_ranks.end, number)
        assert landed is not None and list(landed) == self.nodes
        return list(landed.values())

    def ticket(self, number: int, end: int = 1) -> bytes:
        """The ticket for the only piece of a crossing, at one leader."""
        (ticket,) = self.landed(number)[end - 1]
        assert isinstance(ticket, bytes)
        return ticket


@contextmanager
def linked(*capacities: int | None) -> Iterator[Link]:
    with ranks(1 + len(capacities)) as world:
        made = Link(world)
        made.open(*capacities)
        yield made


# --- a wire alone -------------------------------------------------------------------------------------------


def test_words_and_bytes_between_ranks() -> None:
    messages = [None, "open", b"", {"a": [1, (2, torch.float32)]}, piece(SMALL), "x" * 100_000]
    sizes = [1, 5, MIB, 3, 2 * MIB + 1]
    with ranks(3) as world:
        for rank in world:
            tell(rank, crossing_ranks.connect)
        for rank in world:
            hear(rank)
        for source, to in ((0, 2), (2, 0), (1, 2)):
            tell(world[to], crossing_ranks.hear_from, source, len(messages))
            ask(world[source], crossing_ranks.say_to, to, messages)
            assert hear(world[to]) == messages
        tell(world[1], crossing_ranks.receives, 0, sizes)
        ask(world[0], crossing_ranks.sends, 1, sizes)
        assert hear(world[1]) == [True] * len(sizes)


def test_waiting_for_a_rank_that_ends_is_an_error() -> None:
    with ranks(2) as world:
        for rank in world:
            tell(rank, crossing_ranks.connect)
        for rank in world:
            hear(rank)
        tell(world[0], crossing_ranks.hear_the_end, 1)
        world[1].kill()
        assert hear(world[0]) == "RuntimeError"


# --- there and back -----------------------------------------------------------------------------------------

EVERY: list[Looks] = [
    SMALL,
    ((), torch.float32, 4),
    ((1,), torch.bool, 5),
    ((0, 3), torch.int64, 6),
    ((CHUNK // 2,), torch.bfloat16, 7),
    ((CHUNK + 1,), torch.uint8, 8),
    ((333, 1001), torch.float16, 9),
    ((77, 13), torch.complex64, 10),
    (((2 * AHEAD + 1) * CHUNK + 3,), torch.uint8, 11),
    ((3, CHUNK // 8), torch.int64, 12),
]


@pytest.mark.parametrize("leaders", [1, 2])
def test_every_byte_arrives_at_every_leader(leaders: int) -> None:
    total = sum(piece(looks).nbytes for looks in EVERY)
    with linked(*[128 * MIB] * leaders) as made:
        for looks in ([*EVERY], [*reversed(EVERY)], [SMALL]):  # one after another, over the same link
            landed = made.landed(made.send(*looks))
            for leader, tickets in zip(made.leaders, landed, strict=True):
                for ticket, one in zip(tickets, looks, strict=True):
                    assert isinstance(ticket, bytes)
                    assert ask(leader, crossing_ranks.take, ticket, one), one
                ask(leader, crossing_ranks.drop)
                assert ask(leader, crossing_ranks.extents, 0) == 0  # nothing is kept that was not to be
        crossed = 2 * total + piece(SMALL).nbytes
        assert ask(made.first, crossing_ranks.counts) == {"sent": crossed}  # once, however many leaders
        for leader in made.leaders[:-1]:
            assert ask(leader, crossing_ranks.counts) == {"received": crossed, "sent": crossed}
        assert ask(made.leaders[-1], crossing_ranks.counts) == {"received": crossed}


def test_a_lane_is_open_once_its_ranks_have_joined() -> None:
    with ranks(3) as world:
        made = Link(world)
        ask(made.first, crossing_ranks.depart, made.nodes)
        for leader in made.leaders:
            ask(leader, crossing_ranks.land, 16 * MIB)
        invitations = ask(made.first, crossing_ranks.invited, made.nodes)
        early = made.send(SMALL)
        assert ask(made.first, crossing_ranks.state) == "opening"
        ask(made.leaders[1], crossing_ranks.join, invitations[node(2)])
        assert ask(made.first, crossing_ranks.state) == "opening"
        assert not ask(made.first, crossing_ranks.is_over, early)
        ask(made.leaders[0], crossing_ranks.join, invitations[node(1)])
        assert ask(made.first, crossing_ranks.opened) == "open"
        assert ask(made.leaders[1], crossing_ranks.take, made.ticket(early, 2), SMALL)
        assert [line for line in ask(made.first, crossing_ranks.said) if "the other 2 nodes once" in line]


def test_several_tickets_for_bytes_that_crossed_once() -> None:
    with linked(16 * MIB, 16 * MIB) as made:
        first = made.send(SMALL, pieces=[piece(SMALL, number=70, is_kept=True)])
        middle = made.send(pieces=[piece(SMALL, number=70, comes=False, is_kept=True)])
        last = made.send(pieces=[piece(SMALL, number=70, comes=False)])
        for end, leader in enumerate(made.leaders, start=1):
            tickets = [made.ticket(number, end) for number in (first, middle, last)]
            assert len(set(tickets)) == 3
            assert all(ask(leader, crossing_ranks.take, ticket, SMALL) for ticket in tickets)
            assert ask(leader, crossing_ranks.holds) == 1
            ask(leader, crossing_ranks.drop)
            assert ask(leader, crossing_ranks.extents, 0) == 0
        assert ask(made.first, crossing_ranks.counts) == {"sent": piece(SMALL).nbytes}
        gone = made.send(pieces=[piece(SMALL, number=70, comes=False)])
        assert made.landed(gone) == [[None], [None]]


def test_the_same_bytes_twice_in_one_crossing() -> None:
    with linked(16 * MIB) as made:
        pieces = [
            piece(SMALL, number=80, is_kept=True),
            piece(ODD),
            piece(SMALL, number=80, comes=False),
        ]
        (tickets,) = made.landed(made.send(SMALL, ODD, pieces=pieces))
        for ticket, looks in zip(tickets, (SMALL, ODD, SMALL), strict=True):
            assert isinstance(ticket, bytes)
            assert ask(made.leaders[0], crossing_ranks.take, ticket, looks)


def test_bytes_that_are_let_go_leave_the_lane() -> None:
    with linked(16 * MIB) as made:
        (leader,) = made.leaders
        for number in (90, 91):
            ticket = made.ticket(made.send(SMALL, pieces=[piece(SMALL, number=number, is_kept=True)]))
            assert ask(leader, crossing_ranks.take, ticket, SMALL)
        ask(leader, crossing_ranks.drop)
        assert ask(leader, crossing_ranks.extents, 2) == 2
        assert made.landed(made.send(let_go=(90, 12345))) == [[]]
        assert ask(leader, crossing_ranks.extents, 1) == 1
        ticket = made.ticket(made.send(pieces=[piece(SMALL, number=91, comes=False, is_kept=True)]))
        assert ask(leader, crossing_ranks.take, ticket, SMALL)  # the other one is still there


# --- no room ------------------------------------------------------------------------------------------------


def test_what_the_lane_has_no_room_for_is_in_the_leaders_hand() -> None:
    with linked(16 * SEGMENT, 128 * MIB) as made:
        landed = made.landed(made.send(SMALL, TOO_LARGE, SMALL, TOO_LARGE))
        (small, one, other, two), wide = landed
        assert isinstance(small, bytes) and isinstance(other, bytes)
        assert isinstance(one, int) and isinstance(two, int) and one != two
        narrow = made.leaders[0]
        assert ask(narrow, crossing_ranks.take, small, SMALL) and ask(narrow, crossing_ranks.take, other, SMALL)
        assert all(ask(narrow, crossing_ranks.has_copy, number, TOO_LARGE) for number in (one, two))
        for ticket, looks in zip(wide, (SMALL, TOO_LARGE, SMALL, TOO_LARGE), strict=True):
            assert isinstance(ticket, bytes)
            assert ask(made.leaders[1], crossing_ranks.take, ticket, looks)


def test_what_is_in_hand_is_for_one_ticket_alone() -> None:
    with linked(16 * SEGMENT) as made:
        first = made.send(TOO_LARGE, pieces=[piece(TOO_LARGE, number=60, is_kept=True)])
        again = made.send(pieces=[piece(TOO_LARGE, number=60, comes=False)])
        ((number,),) = made.landed(first)
        assert isinstance(number, int)
        assert made.landed(again) == [[None]]
        assert ask(made.leaders[0], crossing_ranks.numbers_of_copies) == [number]


def test_a_leader_without_memory_passes_on_what_it_cannot_keep() -> None:
    large: Looks = (11 * CHUNK + 5,), torch.uint8, 13
    with linked(16 * SEGMENT, 128 * MIB) as made:
        ask(made.leaders[0], crossing_ranks.without_memory)
        narrow, wide = made.landed(made.send(large, SMALL, ODD))
        assert narrow[0] is None and isinstance(narrow[1], bytes) and narrow[2] is None
        assert ask(made.leaders[0], crossing_ranks.take, narrow[1], SMALL)
        assert ask(made.leaders[0], crossing_ranks.numbers_of_copies) == []
        for ticket, looks in zip(wide, (large, SMALL, ODD), strict=True):
            assert isinstance(ticket, bytes)
            assert ask(made.leaders[1], crossing_ranks.take, ticket, looks)


@pytest.mark.parametrize("capacities", [(None,), (None, 16 * MIB), (16 * MIB, None)])
def test_a_leader_without_a_lane_keeps_all_in_hand(capacities: tuple[int | None, ...]) -> None:
    """It sends no invitation: `Link.open` looks."""
    with linked(*capacities) as made:
        landed = made.landed(made.send(SMALL, ODD))
        for leader, capacity, there in zip(made.leaders, capacities, landed, strict=True):
            lines = [line for line in ask(leader, crossing_ranks.said) if "no lane for features" in line]
            assert len(lines) == (capacity is None)
            for one, looks in zip(there, (SMALL, ODD), strict=True):
                if capacity is None:
                    assert isinstance(one, int) and ask(leader, crossing_ranks.has_copy, one, looks)
                else:
                    assert isinstance(one, bytes) and ask(leader, crossing_ranks.take, one, looks)


# --- the link breaks ----------------------------------------------------------------------------------------


def is_broken(made: Link, crossings: list[int]) -> None:
    """All crossings are over, none has landed; the first rank has said so once, and later ones end at once."""
    assert [ask(made.first, crossing_ranks.end, number) for number in crossings] == [None] * len(crossings)
    assert ask(made.first, crossing_ranks.broken) == "broken"
    for _ in range(3):
        late = made.send(SMALL)
        assert ask(made.first, crossing_ranks.is_over, late)
        assert ask(made.first, crossing_ranks.end, late) is None
    warnings = [line for line in ask(made.first, crossing_ranks.said) if line.startswith("WARNING")]
    (line,) = warnings
    assert "nodes failed: " in line and "until the engine is restarted" in line


@pytest.mark.parametrize(("leaders", "killed"), [(1, 1), (2, 1), (2, 2)])
def test_a_leader_that_dies_while_nothing_crosses(leaders: int, killed: int) -> None:
    with linked(*[16 * MIB] * leaders) as made:
        made.landed(made.send(SMALL))
        made.leaders[killed - 1].kill()
        is_broken(made, [made.send(ODD), made.send(SMALL), made.send(let_go=(1,))])


@pytest.mark.parametrize(("leaders", "killed"), [(1, 1), (2, 1), (2, 2)])
def test_a_leader_that_dies_between_header_and_bytes(leaders: int, killed: int) -> None:
    large: Looks = (8 * MIB,), torch.float32, 14
    with linked(*[128 * MIB] * leaders) as made:
        dying = made.leaders[killed - 1]
        ask(dying, crossing_ranks.stand_before_the_bytes)
        crossings = [made.send(large), made.send(SMALL), made.send(SMALL)]
        assert hear(dying) == "header"
        assert not any(ask(made.first, crossing_ranks.is_over, number) for number in crossings)
        dying.kill()
        is_broken(made, crossings)


def test_a_link_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crossings that waited for it are over, and the thread that waits is notified."""
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(crossing, "failed", lambda seam, error, consequence: said.append((seam, str(error))))
    woken: list[bool] = []
    released = threading.Event()
    early = Crossing()

    def make() -> Wire:
        assert released.wait(DEADLINE)
        raise RuntimeError("no connection")

    departure = Departure(["a"], make, lambda: woken.append(early.is_over), lambda direction, count: None)
    departure.send(early)
    assert not early.is_over and not woken
    released.set()
    eventually(lambda: woken, "the end is told")
    assert departure.state == "broken"
    assert early.is_over and early.landed is None
    assert said == [("nodes", "no connection")] and woken == [True]
    late = Crossing()
    departure.send(late)
    assert late.is_over and late.landed is None
