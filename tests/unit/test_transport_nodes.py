"""The gate of the rank that receives requests: what waits, for how long, and what a pointer is on each node then.

This process is the first rank, with a real lane; the link to the other nodes is one that a test completes by hand.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.distributed import distributed_c10d  # noqa: E402

from mmlane import __version__, host, log  # noqa: E402
from mmlane.engine.topology import RankPlace  # noqa: E402
from mmlane.lane import Lane  # noqa: E402
from mmlane.lane.ticket import read, write  # noqa: E402
from mmlane.transport import gate, scheduler_side  # noqa: E402
from mmlane.transport.base import Here, LostFeature, Scheduler  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.crossing import Crossing, Landed  # noqa: E402
from mmlane.transport.gate import KEPT_S, LATE_S, LOOK_S, Gate  # noqa: E402
from mmlane.transport.inline import Inline  # noqa: E402
from mmlane.transport.lane import Ticket  # noqa: E402
from mmlane.transport.leader_copy import LeaderCopy  # noqa: E402
from mmlane.transport.nodes import Node, announce, find_route, name_of  # noqa: E402
from mmlane.transport.pointer import ShmPointerMMData, slot  # noqa: E402
from mmlane.transport.samples import Samples, Shared  # noqa: E402
from mmlane.transport.segment import Segment  # noqa: E402
from tests.lane.harness.lane_with_readers import copy, published, put  # noqa: E402
from tests.lane.harness.payloads import same  # noqa: E402
from tests.lane.harness.waiting import DEADLINE  # noqa: E402
from tests.unit import crossing_ranks  # noqa: E402
from tests.unit.crossing_ranks import Looks, ask, hear, ranks, tell  # noqa: E402
from tests.unit.launches import launched, without_a_side  # noqa: E402

dist: Any = torch.distributed
MIB = 1 << 20
A, B, C = "0:a", "1:b", "2:c"
ROUTE = [Node(A, [0, 1]), Node(B, [2, 3]), Node(C, [4])]
RANKS = [0, 1, 2, 3, 4]


class FakeDeparture:
    """A link that opens, and on which crossings land, when a test says so."""

    def __init__(
        self, names: list[str], wire: Any, wake: Callable[[], None], count_bytes: Callable[[str, int], None]
    ) -> None:
        self.nodes, self.wire, self.wake, self.count_bytes = names, wire, wake, count_bytes
        self.state = "opening"
        self.invitations: dict[str, bytes] = {}
        self.sent: list[Crossing] = []

    def send(self, crossing: Crossing) -> None:
        self.sent.append(crossing)
        if self.state == "broken":
            self.end(crossing)

    def end(self, crossing: Crossing, **landed: list[Landed]) -> None:
        """It has landed so, by the last letter of a node's name; or the link broke, if nothing is said."""
        crossing.landed = {name: landed[name[-1]] for name in self.nodes} if landed else None
        crossing.is_over = True
        self.wake()


class Clock:
    """The gate's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class First:
    """The first rank of `ROUTE`, and what of it a test looks at."""

    def __init__(self, then: Any = None) -> None:
        self.answered: list[tuple[Any, str]] = []
        self.counted: list[tuple[str, int]] = []
        self.links: list[FakeDeparture] = []
        self.gate = Gate(RANKS, A, then, self.answer, self.count)

    def answer(self, request: Any, message: str) -> None:
        self.answered.append((request, message))

    def count(self, direction: str, count: int) -> None:
        self.counted.append((direction, count))

    def handle(self, *received: Any) -> list[Any]:
        passed = self.gate.handle(list(received))
        assert passed is not None
        return passed

    @property
    def link(self) -> FakeDeparture:
        (found,) = self.links
        return found

    @property
    def is_woken(self) -> bool:
        return bool(select.select([self.gate.wakeup], [], [], 0)[0])


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's module; and this process is the first rank."""
    without_a_side(monkeypatch)
    monkeypatch.setattr(slot, "chain", Chain(Scheduler("dp0", 0, node=A)))
    monkeypatch.setattr(log, "_said", set())


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The default store of torch.distributed."""
    made = dist.HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: made)
    return made


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gate, "time", made)
    return made


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has ranks announce themselves: all of the route, or these."""

    def make(*wanted: int) -> None:
        for node in ROUTE:
            for rank in node.ranks:
                if not wanted or rank in wanted:
                    monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
                    announce(node.name)

    return make


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch, announced: Callable[..., None]) -> Iterator[First]:
    """The first rank, all others announced. Its link is made by the first request with features."""
    first = First()

    def make(*args: Any) -> FakeDeparture:
        first.links.append(FakeDeparture(*args))
        return first.links[-1]

    monkeypatch.setattr(gate, "Departure", make)
    announced()
    yield first
    os.close(first.gate.wakeup)


@pytest.fixture
def first(unopened: First) -> First:
    """The first rank, its link open."""
    (passed,) = unopened.handle(request(inline(torch.zeros(1))))
    assert features(passed)
    unopened.link.state = "open"
    return unopened


@pytest.fixture
def lane() -> Iterator[Lane]:
    """The tokenizer's lane, which this rank has joined."""
    with Lane({"dp0": 1}, capacity=64 * MIB) as made:
        slot.chain.join(bytes(made.invitation))
        assert made.wait_open(DEADLINE)
        yield made


def request(*values: Any, rid: str = "r") -> Any:
    return SimpleNamespace(rid=rid, mm_inputs=SimpleNamespace(mm_items=[item(value) for value in values]))


def item(value: Any) -> Any:
    return SimpleNamespace(feature=value, precomputed_embeddings=None)


def text(rid: str = "text") -> Any:
    return SimpleNamespace(rid=rid, mm_inputs=None)


def batch(*requests: Any) -> Any:
    return SimpleNamespace(batch=list(requests))


def features(value: Any) -> list[Any]:
    return [item.feature for item in value.mm_inputs.mm_items]


def pointer(tensor: Any, /, **state: Any) -> ShmPointerMMData:
    """One that has arrived from the tokenizer."""
    made: ShmPointerMMData = ShmPointerMMData.__new__(ShmPointerMMData)
    made.__setstate__({"shape": tensor.shape, "dtype": tensor.dtype, "precomputed_hash": 17, **state})
    return made


def inline(tensor: Any, /, invitation: bytes = b"") -> ShmPointerMMData:
    brings = {"invitation": invitation} if invitation else {}
    return pointer(tensor, payload="inline", tensor=tensor, **brings)


def by_lane(lane: Lane, tensor: Any) -> ShmPointerMMData:
    return pointer(tensor, payload="ticket", ticket=put(lane, tensor))


def lost(lane: Lane, tensor: Any) -> ShmPointerMMData:
    """By a lane that no rank here knows."""
    ticket = put(lane, tensor)
    lane.withdraw(ticket)
    unknown = write(read(ticket)._replace(lane="mmlane-1-00000000"))
    return pointer(tensor, payload="ticket", ticket=unknown)


def samples(lane: Lane, tensor: Any, requests: int) -> list[ShmPointerMMData]:
    """What the requests of one prompt have for one tensor."""
    with copy(lane, tensor) as room:
        tickets = [published(room) for _ in range(requests)]
    return [
        pointer(tensor, payload="ticket", ticket=ticket, copy=read(tickets[0]).serial, more=requests - 1 - n)
        for n, ticket in enumerate(tickets)
    ]


def on(node: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A value as it arrives in a rank of a node."""
    data = pickle.dumps(value)
    with monkeypatch.context() as there:
        there.setattr(slot, "chain", Chain(Scheduler("dp0", 0, node=node)))
        return pickle.loads(data)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mmlane" and r.levelname == "WARNING"]


T = torch.arange(50_000, dtype=torch.int32)
U = T + 1


# --- who is there -------------------------------------------------------------------------------------------


def test_a_node_is_called_by_its_number_and_where_a_lane_can_be_shared() -> None:
    assert name_of(3) == f"3:{host.lane_scope()}" != name_of(4)
    boot, network = host.lane_scope().split(":")
    assert len(boot) == 36 and int(network) == Path("/proc/self/ns/net").stat().st_ino


def test_all_ranks_are_seen_or_none(announced: Callable[..., None]) -> None:
    assert find_route(RANKS) is None
    announced(0, 1, 2, 3)
    assert find_route(RANKS) is None
    assert find_route([0, 1, 2]) == [Node(A, [0, 1]), Node(B, [2])]
    announced(4)
    assert find_route(RANKS) == ROUTE
    assert find_route([3, 4, 0]) == [Node(B, [3]), Node(C, [4]), Node(A, [0])]


def test_another_version_is_named(announced: Callable[..., None], store: Any) -> None:
    announced()
    store.set("mmlane/node/3", json.dumps({"version": "99.1", "node": B, "new": 1}))
    with pytest.raises(ValueError, match=f"rank 3 runs mmlane 99.1, this one {__version__}: install one"):
        find_route(RANKS)
    assert find_route([0, 1, 2]) is not None


def test_a_node_whose_ranks_cannot_share_a_lane_is_named(announced: Callable[..., None], store: Any) -> None:
    announced()
    other = f"{B.partition(':')[0]}:elsewhere"
    store.set("mmlane/node/3", json.dumps({"version": __version__, "node": other}))
    with pytest.raises(ValueError, match="ranks of one node are in different network namespaces"):
        find_route(RANKS)


# --- what passes, and what waits ----------------------------------------------------------------------------


def test_text_passes_at_once_and_in_order(first: First) -> None:
    messages = [text("a"), "a word", batch(text("b"), text("c")), request(torch.ones(2))]
    assert first.handle(*messages) == messages
    assert first.handle() == []
    assert first.link.sent == []


def test_text_does_not_look_for_other_ranks(unopened: First, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(ranks: Any) -> Any:
        raise AssertionError("looked")

    monkeypatch.setattr(gate, "find_route", none)
    assert len(unopened.handle(text(), request(torch.ones(1)))) == 2
    assert unopened.links == []


def test_what_comes_later_waits_behind_features(first: First, lane: Lane) -> None:
    one, two = request(by_lane(lane, T)), request(by_lane(lane, U), inline(torch.ones(1)))
    before, abort, after = text("before"), SimpleNamespace(rid="r"), text("after")
    assert first.handle(before, one, abort, two) == [before]
    assert first.handle(after) == [] and first.handle() == []
    crossed, other = first.link.sent
    assert [len(crossed.pieces), len(other.pieces)] == [1, 1]
    first.link.end(other, b=[b"2"], c=[b"2"])  # out of turn, as it never is
    assert first.handle() == []
    first.link.end(crossed, b=[b"1"], c=[b"1"])
    last = text("last")
    assert first.handle(last) == [one, abort, two, after, last]
    assert first.handle() == []


def test_features_that_need_not_cross_wait_behind_those_that_do(first: First, lane: Lane) -> None:
    one, two = request(by_lane(lane, T)), request(inline(torch.ones(1)))
    assert first.handle(one, two) == []
    first.link.end(first.link.sent[0], b=[b"1"], c=[b"1"])
    assert first.handle() == [one, two]


def test_what_crosses_are_the_tensors_and_their_looks(first: First, lane: Lane) -> None:
    first.handle(batch(request(by_lane(lane, T)), request(by_lane(lane, U.to(torch.float16)[None]))))
    (crossing,) = first.link.sent
    looks = [(piece.dtype, piece.shape, piece.comes, piece.is_kept) for piece in crossing.pieces]
    assert looks == [(torch.int32, (50_000,), True, False), (torch.float16, (1, 50_000), True, False)]
    assert same(crossing.tensors[0], T) and same(crossing.tensors[1], U.to(torch.float16)[None])
    assert len({piece.number for piece in crossing.pieces}) == 2 and crossing.let_go == []


class Then:
    """The engine's own blocker, which may hold back what it is given."""

    def __init__(self, *answers: Any) -> None:
        self.given: list[Any] = []
        self.answers = list(answers)

    def handle(self, received: Any) -> Any:
        self.given.append(received)
        return self.answers.pop(0)


def test_the_engines_own_blocker_comes_first() -> None:
    kept, other = text("kept"), text("other")
    then = Then([], [kept, other], None)
    first = First(then)
    assert first.gate.handle([kept]) == []
    assert first.gate.handle([other]) == [kept, other]
    assert first.gate.handle([other]) is None
    assert then.given == [[kept], [other], [other]]


def test_a_rank_that_receives_nothing_passes_nothing(first: First, lane: Lane) -> None:
    assert first.gate.handle(None) is None
    one = request(by_lane(lane, T))
    assert first.handle(one) == []
    assert first.gate.handle(None) is None
    first.link.end(first.link.sent[0], b=[b"1"], c=[b"1"])
    assert first.handle() == [one]


# --- the wakeup event ---------------------------------------------------------------------------------------


def test_the_wakeup_event_is_set_when_a_crossing_is_over(first: First, lane: Lane) -> None:
    first.handle(request(by_lane(lane, T)), request(by_lane(lane, U)))
    assert not first.is_woken
    first.link.end(first.link.sent[0], b=[b"1"], c=[b"1"])
    assert first.is_woken
    assert len(first.handle()) == 1
    assert not first.is_woken
    first.link.end(first.link.sent[1], b=[b"2"], c=[b"2"])
    assert first.is_woken
    assert len(first.handle()) == 1
    assert not first.is_woken


def let_go_of(first: First, lane: Lane) -> None:
    """Bytes are let go, and have been: no request waited for that."""
    crossed(first, request(samples(lane, T, 2)[0]), b=[b"1"], c=[7])
    assert first.link.sent[1].let_go
    first.link.end(first.link.sent[1], b=[], c=[])


def look_before_the_wakeup(first: First, lane: Lane) -> None:
    """The engine looks just after a crossing is over, and just before the scheduler is woken for it."""
    first.handle(request(by_lane(lane, T)))
    first.link.sent[0].is_over = True
    assert len(first.handle()) == 1
    first.link.wake()


def break_while_nothing_crosses(first: First, lane: Lane) -> None:
    first.link.state = "broken"
    first.link.wake()


@pytest.mark.parametrize("happens", [let_go_of, look_before_the_wakeup, break_while_nothing_crosses])
def test_the_wakeup_event_is_not_set_when_no_request_waits(
    happens: Callable[[First, Lane], None], first: First, lane: Lane
) -> None:
    """Else an engine with --sleep-on-idle, which is woken by it, would not sleep any more."""
    happens(first, lane)
    first.handle()
    assert not first.is_woken


# --- what a pointer is on each node -------------------------------------------------------------------------


def crossed(first: First, value: Any, **landed: list[Landed]) -> Any:
    """A request after its crossing."""
    assert first.handle(value) == []
    first.link.end(first.link.sent[-1], **landed)
    (passed,) = first.handle()
    assert passed is value
    return value


def test_a_feature_that_has_landed_is_a_ticket_there(
    first: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = crossed(first, request(by_lane(lane, T), by_lane(lane, U)), b=[b"b1", b"b2"], c=[b"c1", b"c2"])
    mine = features(passed)
    assert [same(one.materialize(), tensor) for one, tensor in zip(mine, (T, U), strict=True)] == [True, True]
    for node, tickets in ((B, [b"b1", b"b2"]), (C, [b"c1", b"c2"])):
        there = features(on(node, passed, monkeypatch))
        assert all(isinstance(one.payload, Ticket) for one in there)
        assert [one.payload.ticket for one in there] == tickets
        assert [(one.shape, one.dtype, one.precomputed_hash) for one in there] == [(T.shape, T.dtype, 17)] * 2
        assert not any("tensor" in one.by_node[node] for one in mine)
    here = features(on(A, passed, monkeypatch))
    assert [one.payload.ticket for one in here] == [one.payload.ticket for one in mine]
    assert here[0].invitation is None


def test_a_feature_in_a_leaders_hand_is_a_number_there(
    first: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = crossed(first, request(by_lane(lane, T)), b=[0], c=[b"c"])
    (there,) = features(on(B, passed, monkeypatch))
    assert isinstance(there.payload, LeaderCopy)
    assert there.payload.state() == {"key": 0, "ranks": [2, 3], "shape": T.shape, "dtype": T.dtype}
    assert isinstance(features(on(C, passed, monkeypatch))[0].payload, Ticket)


def test_a_feature_lost_at_a_leader_is_in_its_request_there(
    first: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = crossed(first, request(by_lane(lane, T)), b=[None], c=[b"c"])
    (there,) = features(on(B, passed, monkeypatch))
    assert isinstance(there.payload, Inline) and same(there.materialize(), T)
    assert isinstance(features(on(C, passed, monkeypatch))[0].payload, Ticket)


def test_what_crossed_when_the_link_broke_is_in_its_request(
    first: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = request(by_lane(lane, T))
    assert first.handle(waits) == []
    first.link.end(first.link.sent[0])
    first.link.state = "broken"
    later = request(by_lane(lane, U))
    assert first.handle(later) == [waits, later]
    assert len(first.link.sent) == 1  # nothing is sent on a broken link
    for passed, tensor in ((waits, T), (later, U)):
        for node in (B, C):
            (there,) = features(on(node, passed, monkeypatch))
            assert isinstance(there.payload, Inline) and same(there.materialize(), tensor)
            assert features(passed)[0].by_node[node].keys() == {"payload", "tensor"}


def test_what_travels_inside_is_compact(first: First) -> None:
    passed = request(inline(torch.arange(100_000)[10:20]))
    assert first.handle(passed) == [passed]
    tensor = features(passed)[0].by_node[B]["tensor"]
    assert tensor.tolist() == list(range(10, 20)) and tensor.untyped_storage().nbytes() == 80


def test_the_link_is_between_the_leaders(unopened: First, monkeypatch: pytest.MonkeyPatch) -> None:
    unopened.handle(request(inline(torch.ones(1))))
    monkeypatch.setattr(gate, "TorchWire", lambda leaders: leaders)
    assert unopened.link.nodes == [B, C] and unopened.link.wire() == [0, 2, 4]
    unopened.link.count_bytes("sent", 5)
    assert unopened.counted == [("sent", 5)]


def test_while_the_link_opens_the_others_learn_of_it(
    unopened: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = request(by_lane(lane, T), inline(torch.ones(3)), rid="1")
    assert unopened.handle(one) == [one]
    assert unopened.link.nodes == [B, C] and unopened.link.sent == []
    unopened.link.invitations[C] = b"to c"
    two = request(by_lane(lane, U))
    assert unopened.handle(two) == [two]
    unopened.link.state = "open"
    three = request(inline(torch.ones(4)))
    assert unopened.handle(three) == [three]

    learnt: dict[str, tuple[list[Any], list[bytes]]] = {}
    for node in (A, B, C):
        routes: list[Any] = []
        invitations: list[bytes] = []
        monkeypatch.setattr(slot, "scheduler", SimpleNamespace(land=routes.append))
        monkeypatch.setattr(Chain, "join", lambda self, invitation, to=invitations: to.append(invitation))
        there = [on(node, passed, monkeypatch) for passed in (one, two, three)]
        tensors = [T, torch.ones(3), U, torch.ones(4)]
        arrived = [feature for passed in there for feature in features(passed)]
        if node != A:
            assert all(same(one.materialize(), t) for one, t in zip(arrived, tensors, strict=True))
        learnt[node] = routes, invitations
    assert learnt == {A: ([], []), B: ([ROUTE] * 3, []), C: ([ROUTE] * 3, [b"to c"])}


def test_the_tokenizers_invitation_is_for_its_own_node(first: First, monkeypatch: pytest.MonkeyPatch) -> None:
    invitations: list[bytes] = []
    monkeypatch.setattr(Chain, "join", lambda self, invitation: invitations.append(invitation))
    passed = request(inline(torch.ones(3), b"to a"))
    assert invitations == [b"to a"]
    assert first.handle(passed) == [passed]
    for node in (B, C):
        (there,) = features(on(node, passed, monkeypatch))
        assert there.materialize().tolist() == [1.0] * 3 and there.invitation is None
    assert len(invitations) == 1
    (there,) = features(on(A, passed, monkeypatch))
    assert invitations == [b"to a"] * 2 and there.invitation is not None and there.invitation.data == b"to a"


# --- a pointer alone ----------------------------------------------------------------------------------------


def states(**by_node: dict[str, Any]) -> ShmPointerMMData:
    made = inline(torch.ones(2))
    made.by_node = {f"{number}:{name}": state for number, (name, state) in enumerate(by_node.items())}
    return made


def test_a_pointer_has_a_state_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    made = states(
        a={"payload": "inline", "tensor": torch.zeros(2)}, b={"payload": "leader_copy", "key": 4, "ranks": [2]}
    )
    assert isinstance(on(A, made, monkeypatch).payload, Inline)
    there = on(B, made, monkeypatch)
    assert isinstance(there.payload, LeaderCopy) and there.payload.state()["key"] == 4
    assert isinstance(on(A, there, monkeypatch).payload, Inline)  # it is passed on unchanged
    again = on(B, there, monkeypatch)
    assert again.payload.state() == there.payload.state()


@pytest.mark.parametrize("node", [C, ""])
def test_a_node_that_is_not_named_loses_the_feature(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = states(a={"payload": "inline", "tensor": torch.zeros(2)})
    there = on(node, made, monkeypatch)  # and nothing is raised in the middle of a collective
    assert (there.shape, there.dtype) == ((2,), torch.float32)
    with pytest.raises(LostFeature, match="multimodal features are lost"):
        there.materialize()
    there.close_and_unlink()


@pytest.mark.parametrize("with_scheduler", [True, False])
def test_a_wrong_route_does_not_stop_a_rank(
    with_scheduler: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def land(route: Any) -> None:
        raise ZeroDivisionError("mine")

    if with_scheduler:
        monkeypatch.setattr(slot, "scheduler", SimpleNamespace(land=land))
    made = states(a={"payload": "inline", "tensor": torch.zeros(2), "route": ROUTE})
    assert on(A, made, monkeypatch).materialize().tolist() == [0.0, 0.0]
    assert [line.split(";")[0] for line in warnings(caplog)] == (
        ["mmlane: nodes failed: ZeroDivisionError: mine"] if with_scheduler else []
    )


# --- ranks that are not there -------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, announced: Callable[..., None]) -> Iterator[First]:
    """The first rank, where one has not announced itself."""

    def make(*args: Any) -> Any:
        raise AssertionError("a link is made")

    monkeypatch.setattr(gate, "Departure", make)
    announced(0, 1, 2, 3)
    first = First()
    yield first
    os.close(first.gate.wakeup)


def test_ranks_without_mmlane_get_tensors(
    alone: First, lane: Lane, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """As the engine would send them. One line is said, once they are late."""
    for delay, lines in ((0.0, 0), (LATE_S - 1, 0), (2.0, 1), (LATE_S, 1)):
        clock.now += delay
        mixed = request(by_lane(lane, T), [inline(torch.ones(1), b""), None], torch.zeros(1), "url")
        several = batch(text(), request(by_lane(lane, U)))
        assert alone.handle(mixed, several) == [mixed, several]
        feature, listed, plain, url = features(mixed)
        assert same(feature, T) and type(feature) is torch.Tensor
        assert listed[0].tolist() == [1.0] and listed[1] is None
        assert plain.tolist() == [0.0] and url == "url"
        assert same(features(several.batch[1])[0], U)
        assert len(warnings(caplog)) == lines
    assert "not all ranks run mmlane in mode lane" in warnings(caplog)[0]
    assert alone.answered == []


def test_a_look_is_taken_now_and_then(alone: First, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr(gate, "find_route", lambda ranks: looks.append(clock.now))
    began = clock.now
    for delay in (0.0, LOOK_S / 2, LOOK_S / 4, LOOK_S / 4, LOOK_S / 2, LOOK_S * 2):
        clock.now += delay
        alone.handle(request(inline(torch.ones(1))))
        alone.handle(text())
    assert [now - began for now in looks] == [0.0, LOOK_S, LOOK_S * 3.5]


def test_ranks_that_come_late_are_found(
    unopened: First, lane: Lane, clock: Clock, store: Any, announced: Callable[..., None]
) -> None:
    store.delete_key("mmlane/node/4")
    one, two = request(by_lane(lane, T)), request(by_lane(lane, U))
    assert same(features(unopened.handle(one)[0])[0], T)
    announced(4)
    clock.now += LOOK_S
    unopened.handle(two)
    assert unopened.link.nodes == [B, C]
    assert set(features(two)[0].by_node) == {A, B, C}


def test_another_version_gets_tensors(
    alone: First, lane: Lane, clock: Clock, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.set("mmlane/node/4", json.dumps({"version": "99.1", "node": C}))
    for _ in range(3):
        one = request(by_lane(lane, T))
        assert alone.handle(one) == [one]
        assert same(features(one)[0], T)
        clock.now += LOOK_S
    (line,) = warnings(caplog)
    assert "mmlane 99.1" in line and "rank 4" in line and "inside of it, to each rank" in line


# --- lost features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_open", [True, False])
def test_what_the_first_rank_cannot_take_is_lost_on_all(
    is_open: bool, unopened: First, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    unopened.handle(request(inline(torch.ones(1))))
    unopened.link.state = "open" if is_open else "opening"
    bad = request(lost(lane, T), by_lane(lane, U), rid="bad")
    passed = unopened.handle(bad)
    if is_open:
        (crossing,) = unopened.link.sent
        assert [tensor.tolist() for tensor in crossing.tensors] == [U.tolist()]  # that one alone
        unopened.link.end(crossing, b=[b"b"], c=[b"c"])
        passed = unopened.handle()
    assert passed == [bad] and unopened.answered == []
    causes = set()
    for node in (A, B, C, ""):
        gone, _ = features(on(node, bad, monkeypatch))
        assert gone.tensor is None
        with pytest.raises(LostFeature, match="multimodal features are lost") as raised:
            gone.materialize()
        causes.add(str(raised.value))
    with pytest.raises(LostFeature) as raised:
        features(bad)[0].materialize()
    assert causes == {str(raised.value)}
    if is_open:
        assert features(on(B, bad, monkeypatch))[1].payload.ticket == b"b"


def test_a_request_of_lost_features_alone_does_not_wait(first: First, lane: Lane) -> None:
    bad = request(lost(lane, T))
    assert first.handle(bad) == [bad] and first.link.sent == []


def test_ranks_without_mmlane_are_not_sent_what_is_lost(
    alone: First, lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    """It is answered here: they could not tell that it is."""
    bad, good = request(lost(lane, T), by_lane(lane, U), rid="bad"), request(by_lane(lane, U))
    assert alone.handle(text("a"), bad, good)[1:] == [good]
    ((answered, message),) = alone.answered
    assert answered is bad and "multimodal features are lost" in message
    assert "request bad" in caplog.text


def test_a_lost_request_leaves_its_batch(alone: First, lane: Lane) -> None:
    bad, good, other = request(lost(lane, T)), request(by_lane(lane, U)), text()
    several, empty = batch(good, bad, other), batch(worse := request(lost(lane, T)))
    assert alone.handle(several, empty) == [several]
    assert several.batch == [good, other] and same(features(good)[0], U)
    assert [request for request, _ in alone.answered] == [bad, worse]


# --- samples ------------------------------------------------------------------------------------------------


def test_bytes_of_samples_cross_once(
    first: First, lane: Lane, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (request(each) for each in samples(lane, T, 3))
    other = request(by_lane(lane, U))
    assert first.handle(one) == [] and first.handle(batch(two), other) == [] and first.handle(three) == []
    pieces = [piece for crossing in first.link.sent for piece in crossing.pieces]
    assert [(piece.comes, piece.is_kept) for piece in pieces] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]
    numbers = [piece.number for piece in pieces]
    assert numbers[0] == numbers[1] == numbers[3] != numbers[2]
    assert [len(crossing.tensors) for crossing in first.link.sent] == [1, 0, 1, 0]
    for n, crossing in enumerate(first.link.sent):
        first.link.end(crossing, b=[b"b%d" % n], c=[b"c%d" % n])
    passed = first.handle()
    assert len(passed) == 4 and passed[0] is one and passed[3] is three
    assert features(on(B, three, monkeypatch))[0].payload.ticket == b"b3"
    clock.now += KEPT_S + 1
    assert first.handle() == []
    # All that were promised have come: the last one has let go of the bytes.
    assert [crossing.let_go for crossing in first.link.sent] == [[]] * 4
    again = request(samples(lane, T, 1)[0])
    first.handle(again)
    assert first.link.sent[-1].pieces[0].comes and first.link.sent[-1].pieces[0].number not in numbers


def test_the_same_bytes_in_two_places_of_one_request(first: First, lane: Lane) -> None:
    first.handle(request(*samples(lane, T, 2)))
    (crossing,) = first.link.sent
    assert [(piece.comes, piece.is_kept) for piece in crossing.pieces] == [(True, True), (False, False)]
    assert len(crossing.tensors) == 1


def test_other_looks_are_other_bytes(first: First, lane: Lane) -> None:
    """A ticket for a part of an extent, or for it as another dtype, is no further ticket for the same."""
    with copy(lane, T) as room:
        parts = [room.tensor, room.tensor[:100], room.tensor.view(torch.float32), room.tensor.view(2, -1)]
        tickets = [room.publish(part) for part in parts]
    first.handle(
        request(*(pointer(p, payload="ticket", ticket=t, more=1) for p, t in zip(parts, tickets, strict=True)))
    )
    (crossing,) = first.link.sent
    assert all(piece.comes for piece in crossing.pieces) and len(crossing.tensors) == 4


def test_bytes_are_kept_as_long_as_more_are_promised(first: First, lane: Lane, clock: Clock) -> None:
    one, two, three = samples(lane, T, 3)
    crossed(first, request(one), b=[b"b"], c=[b"c"])
    clock.now += KEPT_S - 1
    assert first.handle() == [] and len(first.link.sent) == 1
    crossed(first, request(two), b=[b"b"], c=[b"c"])
    assert not first.link.sent[-1].pieces[0].comes
    clock.now += KEPT_S - 1  # after the last one
    assert first.handle() == [] and len(first.link.sent) == 2
    clock.now += 2
    assert first.handle() == []
    letting_go = first.link.sent[-1]
    assert len(first.link.sent) == 3 and letting_go.pieces == []
    assert letting_go.let_go == [first.link.sent[0].pieces[0].number]
    assert first.handle() == [] and len(first.link.sent) == 3  # once
    first.handle(request(three))
    (piece,) = first.link.sent[-1].pieces
    assert piece.comes and piece.number != letting_go.let_go[0]


@pytest.mark.parametrize("landed", [{"b": [b"b"], "c": [3]}, {"b": [None], "c": [b"c"]}, {}])
def test_bytes_that_are_not_in_every_lane_are_let_go(
    landed: dict[str, list[Landed]], first: First, lane: Lane
) -> None:
    one, two = samples(lane, T, 2)
    kept = crossed(first, request(samples(lane, U, 2)[0]), b=[b"b"], c=[b"c"])
    crossed(first, request(one), **landed)
    arrived, letting_go = first.link.sent[1:]
    assert letting_go.let_go == [arrived.pieces[0].number] and letting_go.pieces == []
    first.handle(request(two))
    assert first.link.sent[-1].pieces[0].comes
    assert kept


def test_what_is_known_of_a_copy_that_is_shared(lane: Lane) -> None:
    """Of the three requests of a prompt, in which one tensor stands twice and another once."""
    together = Samples(3)
    one, other = torch.ones(3), torch.ones(3)
    found: dict[str, list[Shared]] = {"one": [], "other": []}
    for _ in range(3):
        together.expect([one, one, other])
        for name, tensor in (("one", one), ("one", one), ("other", other)):
            ticket, shared = together.put(lane, tensor)
            assert isinstance(ticket, bytes) and shared is not None
            found[name].append(shared)
    assert [shared.more for shared in found["one"]] == [5, 4, 3, 2, 1, 0]
    assert [shared.more for shared in found["other"]] == [2, 1, 0]
    copies = [{shared.copy for shared in of} for of in found.values()]
    assert [len(of) for of in copies] == [1, 1] and copies[0] != copies[1]


def test_copies_of_another_kind_promise_nothing(lane: Lane) -> None:
    """The first sample may go inline, while the lane is not open."""
    together = Samples(2)
    together.expect([T])
    together.copied(T, torch.clone)
    together.expect([T])
    _, shared = together.put(lane, T)
    assert shared is not None and shared.more == 0
    together.expect([T, T])
    assert Samples().put(lane, T)[1] is None  # one request, one place


def test_a_tokenizers_ticket_tells_how_many_follow(lane: Lane) -> None:
    together = Samples(3)
    tickets = []
    for _ in range(3):
        together.expect([T])
        ticket, shared = together.put(lane, T)
        assert isinstance(ticket, bytes)
        tickets.append(Ticket(ticket, None, shared))
    first = read(tickets[0].ticket).serial
    states = [ticket.state() for ticket in tickets]
    assert [(state["copy"], state["more"]) for state in states] == [(first, 2), (first, 1), (first, 0)]
    received = [slot.chain.receive({"payload": "ticket", **state}) for state in states]
    assert [one.shared for one in received if isinstance(one, Ticket)] == [one.shared for one in tickets]
    assert Ticket(b"t", None).state() == {"ticket": b"t"}


# --- copies of a leader -------------------------------------------------------------------------------------

LOOKS: list[Looks] = [
    ((3, 1000), torch.float32, 1),
    ((), torch.int64, 2),
    ((5_000_000,), torch.uint8, 3),
    ((7,), torch.bool, 4),
    ((2, 3, 4), torch.bfloat16, 5),
]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_leaders_tensors_go_to_all_ranks_of_its_node(world: int) -> None:
    with ranks(world) as there:
        for rank in there:
            tell(rank, crossing_ranks.hand_over, 10, LOOKS)
        for rank in there:
            assert hear(rank) == [True] * len(LOOKS)


def test_what_is_released_is_not_kept_by_the_leader() -> None:
    with ranks(1) as (rank,):
        assert ask(rank, crossing_ranks.drop_copies) == [2]


def test_a_process_that_is_no_rank_passes_a_number_on() -> None:
    state = {"key": 1, "ranks": [0, 1], "shape": (2,), "dtype": torch.uint8}
    assert Chain(Here()).receive({"payload": "leader_copy", **state}).state() == state
    offered, _ = Chain(Here()).offer(torch.ones(3))
    assert isinstance(offered, Segment)  # no leader keeps what is sent
    offered.release()


# --- ranks take part ----------------------------------------------------------------------------------------


class Poller:
    """In the place of the engine's, which waits while nothing is to be done."""

    def __init__(self) -> None:
        self.registered: list[tuple[Any, ...]] = []

    def register(self, *words: Any) -> None:
        self.registered.append(words)


def take_part(
    monkeypatch: pytest.MonkeyPatch, rank: int, scheduler: Any, **options: Any
) -> scheduler_side.SchedulerSide | None:
    """What a scheduler of four ranks on two nodes does when it is made."""
    monkeypatch.setitem(sys.modules, "zmq", SimpleNamespace(POLLIN=1))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    server_args = launched(nnodes=2, tp_size=4, **options)
    scheduler_side.start(scheduler, server_args, RankPlace(None, 0, rank), capacity=None, pinned=0)
    return slot.scheduler


def test_all_ranks_announce_themselves_and_the_first_has_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, poller = object(), Poller()
    for rank in range(4):
        scheduler = SimpleNamespace(input_blocker=theirs, idle_sleeper=SimpleNamespace(poller=poller))
        this = take_part(monkeypatch, rank, scheduler)
        assert this is not None and this.chain.here.node == name_of(rank // 2)
        assert isinstance(this.chain.here, Scheduler) and this.chain.here.number == rank % 2
        assert (scheduler.input_blocker is theirs) is (rank > 0)
        if rank == 0:
            assert isinstance(scheduler.input_blocker, Gate)
            # A descriptor that can be written to all the time would keep the engine awake.
            assert poller.registered == [(scheduler.input_blocker.wakeup, 1)]
            os.close(scheduler.input_blocker.wakeup)
    assert find_route(range(4)) == [Node(name_of(0), [0, 1]), Node(name_of(1), [2, 3])]


def test_the_gate_is_the_receivers_from_0_5_13_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    sender = SimpleNamespace(send_output=lambda *words: sent.append(words))
    scheduler = SimpleNamespace(
        request_receiver=Receiver(None), ipc_channels=SimpleNamespace(send_to_tokenizer=sender), idle_sleeper=None
    )
    take_part(monkeypatch, 0, scheduler)
    gate = scheduler.request_receiver.input_blocker
    assert isinstance(gate, Gate)
    monkeypatch.setattr(scheduler_side, "aborted", lambda request, message: (request, message))
    gate._answer("request", "why")
    assert sent == [(("request", "why"), "request")]
    os.close(gate.wakeup)


@dataclass(frozen=True)
class Receiver:
    """The engine's, as far as the gate is concerned."""

    input_blocker: Any


def test_a_first_rank_without_a_gate_has_no_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """It then joins no lane, so that no ticket comes which would be broadcast to other nodes."""
    monkeypatch.setattr(slot, "chain", Chain(Here()))
    with pytest.raises(AttributeError):
        take_part(monkeypatch, 0, SimpleNamespace())
    assert slot.scheduler is None and isinstance(slot.chain.here, Here) and not slot.chain.here.node
    assert find_route(range(4)) is None


def test_on_one_node_no_rank_announces_itself(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    for options in ({"pp_size": 2}, {"enable_dp_attention": True, "dp_size": 2}):
        this = take_part(monkeypatch, 0, SimpleNamespace(), **options)
        assert this is not None and this.chain.here.node == ""
    assert not store.check(["mmlane/node/0"])


def test_what_is_lost_on_one_node_alone_ends_the_rank(lane: Lane) -> None:
    """Its peers elsewhere may have taken it. What the first rank has found lost fails its request."""
    side = scheduler_side.SchedulerSide(slot.chain)
    with pytest.raises(RuntimeError, match="are lost on this node alone"):
        side.take([request(lost(lane, T))], None)
    known = lost(lane, T)
    known.lost = "why"
    ((_, message),) = side.take([request(known)], None)
    assert message == "why"
