"""Sequences of good, mutated and random messages, from processes that have proven nothing, readers and members.

Whatever is said: the lane stays as it was, its real readers exchange tensors, nothing is raised, each message that
makes no sense is counted, and no descriptor is left.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmlane.lane import Invitation, Lane, Reader, admission, protocol
from mmlane.lane.status import switch
from tests.effort import examples
from tests.lane.harness.kernel import open_files
from tests.lane.harness.lane_with_readers import new_tensor, put
from tests.lane.harness.sockets import HUGE, KINDS, MAPPED, admitted, hello, receive, slot_and_serial, visit
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20
QUESTIONS = (protocol.STATUS, protocol.OFF, protocol.ON)

# --- messages ----------------------------------------------------------------------------------------------

# What a message begins as; with a lane's invitation and the tickets that it has issued.
Base = Callable[[Invitation, list[tuple[int, int]]], bytes]
BASES: dict[str, Base] = {
    "HELLO": lambda lane, tickets: hello(lane),
    "HELLO of another": lambda lane, tickets: hello(lane, "tp", 1),
    "HELLO with another secret": lambda lane, tickets: hello(Invitation.make(lane.name)),
    "MAPPED": lambda lane, tickets: MAPPED,
    "RELEASE": lambda lane, tickets: protocol.pairs(protocol.RELEASE, tickets[-5:]),
    "NOT_SEEN": lambda lane, tickets: protocol.pairs(protocol.NOT_SEEN, tickets[-5:]),
    "RELEASE of nothing": lambda lane, tickets: protocol.pairs(protocol.RELEASE, [(0, 0), (HUGE, HUGE), (1, 1)]),
    "REJECT": lambda lane, tickets: protocol.reject("no room"),
    "WELCOME": lambda lane, tickets: protocol.welcome(lane.secret, "once", 4096, 1, "/dev/zero"),
    "nothing": lambda lane, tickets: b"",
    **{name: partial(lambda kind, lane, tickets: bytes((kind,)), kind) for name, kind in KINDS.items()},
}
MOVES = st.tuples(
    st.sampled_from(["cut", "flip", "insert", "repeat"]), st.integers(0, 5000), st.binary(min_size=1, max_size=20)
)
MUTATED = st.tuples(st.sampled_from(sorted(BASES)), st.lists(MOVES, max_size=3))
NOISE = st.binary(max_size=50)
Recipe = tuple[str, list[tuple[str, int, bytes]]] | bytes
RECIPE = MUTATED | NOISE
RECIPES = st.lists(RECIPE, min_size=1, max_size=4)


def mutated(message: bytes, moves: list[tuple[str, int, bytes]]) -> bytes:
    for what, at, noise in moves:
        at %= len(message) + 1
        if what == "cut":
            message = message[:at]
        elif what == "flip":
            message = message[:at] + bytes(byte ^ noise[0] for byte in message[at : at + 1]) + message[at + 1 :]
        elif what == "insert":
            message = message[:at] + noise + message[at:]
        else:
            message = message[:at] * 2
    return message[: 2 * protocol.LIMIT]


def is_this_hello(message: bytes, good: bytes) -> bool:
    """Whether a message is a HELLO that says the same, if in other letters."""
    message = message[: protocol.LIMIT]
    if message[:3] != good[:3]:
        return False
    try:
        said = json.loads(message[3:])
    except (ValueError, RecursionError):
        return False
    return json.dumps(said, sort_keys=True) == json.dumps(json.loads(good[3:]), sort_keys=True)


def is_malformed(message: bytes, serials: set[int]) -> bool:
    """Whether a member's message makes no sense."""
    message = message[: protocol.LIMIT] or b"\0"
    if message[0] == protocol.MAPPED:
        return False
    if message[0] not in (protocol.RELEASE, protocol.NOT_SEEN):
        return True
    try:
        items = protocol.read_pairs(message)
    except protocol.ProtocolError:
        return True
    return not items or any(serial not in serials for _, serial in items)


# --- the machine -------------------------------------------------------------------------------------------


class Fuzz(RuleBasedStateMachine):
    """An open lane of two real readers and a bare member, and a lane that waits for its second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = ExitStack()
        self.raised: list[object] = []
        self.before = open_files()

    @initialize()
    def begin(self) -> None:
        self.scope.enter_context(no_rest())
        self.scope.enter_context(collected(self.raised))
        self.open = self.scope.enter_context(Lane({"tp": 3}, capacity=4 * MIB, segment=65536))
        self.waiting = self.scope.enter_context(Lane({"tp": 2}, capacity=4 * MIB, segment=65536))
        self.readers = [self.scope.enter_context(Reader("tp", number)) for number in (0, 1)]
        for reader in self.readers:
            reader.join(self.open.invitation)
        self.member = self.scope.enter_context(admitted(self.open, "tp", 2))
        assert self.open.wait_open(DEADLINE)
        self.candidate: socket.socket | None = None  # of the other lane's first reader
        self.candidate_has_joined = False
        self.tickets: list[tuple[int, int]] = []
        self.rejected = {self.open.name: 0, self.waiting.name: 0}
        self.malformed = {self.open.name: 0, self.waiting.name: 0}
        self.off = {self.open.name: False, self.waiting.name: False}

    def message(self, lane: Lane, recipe: Recipe) -> bytes:
        if isinstance(recipe, bytes):
            return recipe
        return mutated(BASES[recipe[0]](lane.invitation, self.tickets), recipe[1])

    # --- unproven ---

    @rule(recipes=RECIPES, of_open=st.booleans())
    def a_process_says_anything(self, recipes: list[Recipe], of_open: bool) -> None:
        lane = self.open if of_open else self.waiting
        messages = [self.message(lane, recipe) for recipe in recipes]
        first = messages[0]
        if any(is_this_hello(first, hello(lane.invitation, "tp", number)) for number in (0, 1)):
            return  # that is a reader
        with visit(lane.name) as connection:
            with suppress(ConnectionError):  # rejected already
                for message in messages:
                    connection.send(message)
            answer, fds = receive(connection)
            assert not fds and receive(connection) == (b"", [])
        if first and first[0] in QUESTIONS:
            assert protocol.kind(answer) == protocol.STATUS
            if first[0] != protocol.STATUS:
                self.off[lane.name] = first[0] == protocol.OFF
        else:
            assert protocol.kind(answer) == protocol.REJECT
            self.rejected[lane.name] += 1

    @rule(of_open=st.booleans())
    def a_process_comes_and_goes(self, of_open: bool) -> None:
        lane = self.open if of_open else self.waiting
        visit(lane.name).close()
        self.rejected[lane.name] += 1

    @rule(number=st.integers(0, 2))
    def a_second_reader_of_a_number(self, number: int) -> None:
        with visit(self.open.name) as connection:
            connection.send(hello(self.open.invitation, "tp", number))
            answer, fds = receive(connection)
            assert "is here already" in protocol.read_reject(answer) and not fds
        self.rejected[self.open.name] += 1

    # --- proven ---

    @rule()
    def a_reader_is_welcomed(self) -> None:
        connection = self.scope.enter_context(visit(self.waiting.name))
        connection.send(hello(self.waiting.invitation))
        answer, fds = receive(connection)
        for fd in fds:
            os.close(fd)
        if self.candidate is None:
            assert protocol.kind(answer) == protocol.WELCOME and len(fds) == 1
            self.candidate = connection
        else:
            assert "is here already" in protocol.read_reject(answer) and not fds
            self.rejected[self.waiting.name] += 1

    @rule(recipe=RECIPE)
    def a_reader_says_anything(self, recipe: Recipe) -> None:
        if self.candidate is None:
            return
        message = self.message(self.waiting, recipe)
        self.candidate.send(message)
        if self.candidate_has_joined:
            self.malformed[self.waiting.name] += is_malformed(message, set())
        elif message[:1] == MAPPED:
            self.candidate_has_joined = True
            eventually(lambda: self.waiting.stats().joined == {"tp": [0]}, "it has joined")
        else:
            assert protocol.kind(receive(self.candidate)[0]) == protocol.REJECT
            self.rejected[self.waiting.name] += 1
            self.candidate = None

    @rule()
    def a_reader_goes(self) -> None:
        if self.candidate is not None:
            self.waiting.drain()  # so that what it has said is counted
            self.candidate.close()
            self.rejected[self.waiting.name] += not self.candidate_has_joined
            eventually(lambda: self.waiting.stats().joined == {"tp": []}, "it has gone")
            self.candidate, self.candidate_has_joined = None, False

    # --- members ---

    @rule(recipes=RECIPES)
    def a_member_says_anything(self, recipes: list[Recipe]) -> None:
        serials = {serial for _, serial in self.tickets}
        for recipe in recipes:
            message = self.message(self.open, recipe)
            self.member.send(message)
            self.malformed[self.open.name] += is_malformed(message, serials)

    # --- what goes on ---

    @rule()
    def a_tensor_travels(self) -> None:
        self.travel(self.open, self.readers)

    def travel(self, lane: Lane, readers: list[Reader]) -> None:
        if self.off[lane.name]:
            assert switch(lane.name, False).state == "open"
            self.off[lane.name] = False
        tensor = new_tensor()
        ticket = put(lane, tensor)
        for reader in readers:
            assert torch.equal(reader.take(ticket), tensor)
        if lane is self.open:
            self.tickets.append(slot_and_serial(ticket))
            assert lane.stats().tickets == 1  # the bare member has it still
            self.member.send(protocol.pairs(protocol.RELEASE, self.tickets[-1:]))
        eventually(lambda: lane.stats().tickets == 0, "the ticket ends")

    @rule()
    def a_look(self) -> None:
        self.open.housekeeping.look()

    @invariant()
    def the_lanes_are_as_they_were(self) -> None:
        if not hasattr(self, "open"):
            return
        assert not self.raised
        for lane in (self.open, self.waiting):
            name = lane.name
            eventually(partial(self.all_are_rejected, lane), "rejected peers are counted")
            stats = lane.stats()
            assert stats.malformed_messages == self.malformed[name]
            joined = [0, 1, 2] if lane is self.open else [0] * self.candidate_has_joined
            assert (stats.joined, stats.tickets, stats.used_bytes) == ({"tp": joined}, 0, 0)
            assert stats.state == ("off" if self.off[name] else "open" if lane is self.open else "waiting")

    def all_are_rejected(self, lane: Lane) -> bool:
        return lane.stats().rejected_peers == self.rejected[lane.name]

    def teardown(self) -> None:
        if not hasattr(self, "open"):
            return
        with self.scope:
            self.a_tensor_travels()
            self.a_reader_goes()
            self.the_waiting_lane_opens()
        del self.open, self.waiting, self.readers, self.member, self.candidate
        if sys.exc_info()[0] is not None:
            return  # what has failed holds some
        gc.collect()
        eventually(lambda: not open_files() - self.before, "all descriptors are closed")
        assert not self.raised

    def the_waiting_lane_opens(self) -> None:
        for reader in self.readers:
            reader.join(self.waiting.invitation, DEADLINE)
        assert self.waiting.wait_open(DEADLINE)
        self.travel(self.waiting, self.readers)


class no_rest:
    """Have lanes accept the next process at once after a rejection: there are many here."""

    def __enter__(self) -> None:
        self._rest = admission._REST
        admission._REST = 0.0

    def __exit__(self, *_: object) -> None:
        admission._REST = self._rest


class collected(logging.Handler):
    """Collect all errors: of threads, of finalizers, and those that are logged."""

    def __init__(self, into: list[object]) -> None:
        super().__init__(logging.ERROR)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())

    def __enter__(self) -> None:
        self._hook, threading.excepthook = threading.excepthook, self._into.append
        logger = logging.getLogger("mmlane.lane")
        logger.addHandler(self)
        self._level, level = logger.level, logging.ERROR
        logger.setLevel(level)

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self._hook
        logger = logging.getLogger("mmlane.lane")
        logger.removeHandler(self)
        logger.setLevel(self._level)


Fuzz.TestCase.settings = settings(
    max_examples=examples(25, 2000), stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
TestFuzz = pytest.mark.long(Fuzz.TestCase)
