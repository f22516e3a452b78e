"""The protocol as a model: no order of steps breaks protocol 3, some break protocol 2, and each rule of
protocol 3 is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.effort import examples
from tests.lane.protocol_model import EXPECTED, INVARIANTS, PROTOCOL_2, PROTOCOL_3, Process, Rules, World

SAID: list[list[tuple[Any, ...]]] = [
    *([], [], [], [("STATUS",)]),
    *([("HELLO", place, False), ("MAPPED",)] for place in EXPECTED),
]
CERTAIN = 20_000  # runs at most, to find what is there: it is found within some hundred, seldom two thousand
KINDS = ["meet", "run", "serve", "time-out", "put", "send", "take", "drop", "let-go", "recall", "log"]
KINDS += ["forget", "start"]
# Of these there are few in one run.
TROUBLE = ["patience", "end", "end", "close", "uninvited", "uninvited"]


class Violation(Exception):
    """An invariant does not hold."""


class Steps(RuleBasedStateMachine):
    """All parties take steps in any order, until an invariant that is watched does not hold.

    One rule, not one for each kind of step: of many rules hypothesis leaves out some in each run, and hardly any
    run would follow a ticket to its end.
    """

    def __init__(self, rules: Rules, watched: frozenset[str]) -> None:
        super().__init__()
        self.world = World(rules)
        self.watched = watched
        self.trouble = 0  # how much is yet to come

    @initialize(random=st.randoms(use_true_random=True))
    def begin(self, random: Random) -> None:
        """What happens is drawn evenly: hypothesis itself would prefer what comes first or last."""
        self.random = random
        self.trouble = random.randrange(6)
        for rank in random.sample(list(self.world.ranks.values()), random.randrange(len(EXPECTED) + 1)):
            self.world.meet(rank)

    @rule()
    def step(self) -> None:
        trouble = self.trouble > 0 and self.random.random() < 0.3
        kinds = TROUBLE if trouble else KINDS
        for kind in self.random.sample(kinds, len(kinds)):
            if moves := self.moves(kind):
                move, *arguments = self.random.choice(moves)
                note(f"{kind}: {move.__name__} {arguments}")
                self.trouble -= trouble
                move(*arguments)
                return

    def moves(self, kind: str) -> list[tuple[Any, ...]]:
        """What can happen next, of one kind."""
        world, groups = self.world, "ab" if self.world.is_open else ""
        ranks = [rank for rank in world.ranks.values() if rank.state != "left"]
        busy = [rank for rank in ranks if world.is_busy(rank)]
        arriving = [(rank, ticket) for ticket in world.tickets for rank in ranks if world.awaits(rank, ticket)]
        match kind:
            case "meet":
                return [
                    (world.meet, rank, times) for rank in ranks for times in (1, 2, 3, 8) if world.is_busy(rank)
                ]
            case "run":
                return [(world.run, rank) for rank in busy]
            case "serve":
                return [
                    (world.serve, connection) for connection in world.connections if world.has_work(connection)
                ]
            case "time-out":
                return [(world.times_out, rank) for rank in ranks if rank.state in ("waiting", "mapped")]
            case "put":
                return [(world.put, group, drain) for group in groups for drain in (False, True)]
            case "send":
                return [
                    (world.send, group, *some) for group in groups for some in (ranks, *([rank] for rank in ranks))
                ]
            case "take":
                return [(world.take, *pair) for pair in arriving]
            case "drop":
                return [(world.drop, *pair) for pair in arriving]
            case "let-go":
                processes = world.processes
                return [
                    (world.let_go, p, ticket) for ticket in world.tickets for p in processes if ticket in p.seen
                ]
            case "recall":
                return [(world.recall, ticket) for ticket in world.out() if not world.closed]
            case "log":
                return [(world.log_handler_returns,)] if world.locked else []
            case "forget":
                return [
                    (world.forgets, rank) for rank in ranks if world.closed and rank.state in ("joined", "ended")
                ]
            case "start":
                return [(world.starts, place) for place in EXPECTED if world.ranks[place].state == "left"]
            case "patience":
                return [(world.give_up_on, c) for c in world.connections if c.stage in ("unproven", "proven")]
            case "end":
                return [(end, rank) for rank in ranks for end in (world.dies, world.leaves)]
            case "close":
                return [(world.close,)] if world.opened else []
            case "uninvited":
                return [(world.uninvited, visible, *said) for visible in (True, True, False) for said in SAID]
        raise ValueError(kind)

    # --- always --------------------------------------------------------------------------------------------

    def judge(self, violations: set[str]) -> None:
        for name in sorted(violations & self.watched):
            raise Violation(f"{name}: {INVARIANTS[name]}")

    @invariant()
    def holds(self) -> None:
        self.judge(self.world.check())

    def teardown(self) -> None:
        self.judge(self.world.check_that_it_opens())


def search(rules: Rules, watched: Iterable[str], many: int) -> None:
    """Raise a Violation if one is found."""
    wanted = settings(
        max_examples=many, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False
    )

    class Watched(Steps):
        def __init__(self) -> None:
            super().__init__(rules, frozenset(watched))

    run_state_machine_as_test(Watched, settings=wanted)


@pytest.mark.long
def test_protocol_3_keeps_every_invariant() -> None:
    search(PROTOCOL_3, INVARIANTS, examples(300, 10_000))


def test_protocol_2_never_frees_what_is_held() -> None:
    search(PROTOCOL_2, ["I2"], examples(100, 5_000))


@pytest.mark.parametrize("name", ["I1", "I7 open", "I7 read", "I7 fill", "I7 visit", "W put", "W drop"])
def test_protocol_2_violates_the_invariant(name: str) -> None:
    with pytest.raises(Violation, match=name):
        search(PROTOCOL_2, [name], CERTAIN)


# A rule of protocol 3 -> what happens without it.
NEEDED_FOR = {
    "proof": ["I7 read"],
    "proof_first": ["I7 read"],
    "visible": ["I7 visit"],
    "numbered": ["I7 open"],
    "end_first": ["I7 open"],
    "ends_with_member": ["I1", "I2"],
    "mapped_is_joined": ["I1"],
    "known_first": ["I1"],
    "proven_may_stay": ["L"],
    "unproven_must_go": ["L"],
    "tries_again": ["L"],
    "hands_over": ["W drop"],
    "logs_after": ["W put"],
    "all_owe": ["I2"],
    "by_serial": ["I2"],
    "holder_is_silent": ["I2"],
    "promise_kept": ["I2"],
    "linger": ["I1"],
}


def test_every_rule_is_tried() -> None:
    assert NEEDED_FOR.keys() == {field.name for field in fields(Rules)}


@pytest.mark.parametrize("rule", NEEDED_FOR)
def test_protocol_3_breaks_without(rule: str) -> None:
    with pytest.raises(Violation):
        search(replace(PROTOCOL_3, **{rule: False}), NEEDED_FOR[rule], CERTAIN)


# --- the shortest stories -----------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("rules, breaks", [(PROTOCOL_2, True), (PROTOCOL_3, False)], ids=["2", "3"])


def world_of(rules: Rules) -> tuple[World, Process, Process, Process]:
    world = World(rules)
    a0, a1, b0 = world.ranks.values()
    return world, a0, a1, b0


def let_uninvited_process_try(world: World) -> None:
    uninvited = world.uninvited(True, ("HELLO", ("a", 1), False), ("MAPPED",))
    for _ in ("accept", "HELLO", "MAPPED"):
        world.serve(uninvited)


@BOTH
def test_an_uninvited_process_connects_before_the_last_rank(rules: Rules, breaks: bool) -> None:
    world, a0, a1, b0 = world_of(rules)
    world.meet(a0)
    world.meet(b0)
    let_uninvited_process_try(world)
    assert world.check() == ({"I7 open", "I7 read"} if breaks else set())
    assert world.is_open == breaks
    world.meet(a1)
    assert world.is_open


@BOTH
def test_an_uninvited_process_connects_after_the_last_rank(rules: Rules, breaks: bool) -> None:
    world, *ranks = world_of(rules)
    world.calm()
    let_uninvited_process_try(world)
    world.send("a", *ranks)
    assert world.check() == ({"I7 fill", "I7 read"} if breaks else set())
    (ticket,) = world.tickets
    for rank in ticket.took:
        world.let_go(rank, ticket)
        world.meet(rank)
    assert ticket.ended != breaks


@BOTH
def test_a_rank_has_waited_long_enough_when_it_has_said_mapped(rules: Rules, breaks: bool) -> None:
    world, a0, a1, b0 = world_of(rules)
    world.meet(a0)
    world.meet(b0)
    world.meet(a1, times=2)  # WELCOME is on its way
    world.run(a1)  # MAPPED is on its way
    connection = world.connections[-1]
    world.times_out(a1)
    world.serve(connection)
    assert world.is_open
    world.send("a", a0, a1)
    assert world.check() == ({"I1"} if breaks else set())


@BOTH
def test_a_finalizer_runs_before_joined_is_read(rules: Rules, breaks: bool) -> None:
    world, a0, a1, b0 = world_of(rules)
    world.meet(a0)
    world.meet(b0)
    world.meet(a1, times=3)
    ticket = world.put("a", drain=False)
    assert ticket is not None
    world.drop(a1, ticket)
    assert world.check() == ({"W drop"} if breaks else set())


@BOTH
def test_a_put_finds_that_a_ticket_was_lost(rules: Rules, breaks: bool) -> None:
    world, *ranks = world_of(rules)
    world.calm()
    lost = world.put("a", drain=False)
    assert lost is not None
    world.recall(lost)
    for rank in ranks:
        world.run(rank)  # hears RECALL
        world.run(rank)  # says NOT_SEEN
    assert (world.put("a", drain=True) is None) == breaks
    assert world.check() == ({"W put"} if breaks else set())


@pytest.mark.parametrize("end_first", [True, False])
def test_a_rank_starts_again_before_its_end_is_noticed(end_first: bool) -> None:
    """An open lane must close, though the number has a connection at every moment."""
    world, _, a1, _ = world_of(replace(PROTOCOL_3, end_first=end_first))
    world.calm()
    world.dies(a1)
    world.starts(("a", 1))
    world.meet(world.ranks["a", 1])
    assert world.closed == end_first
    assert ("I7 open" in world.check()) != end_first


def test_a_rank_closes_its_reader_and_holds_a_tensor() -> None:
    """A rank that closes its reader can hang up at once: in a closed lane, nothing that it holds is used again."""
    world, a0, a1, _ = world_of(PROTOCOL_3)
    world.calm()
    world.send("a", a0)
    world.leaves(a0)
    world.calm()
    assert world.closed and a0.held
    world.take(a1, world.tickets[0])
    assert a1.held and world.put("a", drain=True) is None
    assert not world.check()
