"""Readers that joined by the rules and then send arbitrary messages: the lane serves the others on.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmlane.lane import Invitation, Lane, Reader, Refused, Reservation, inbox, protocol
from tests.effort import examples
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.child import Child, die_with_the_parent
from tests.lane.harness.lane_with_readers import new_tensor, put
from tests.lane.harness.sockets import HUGE, KINDS, MAPPED, admitted, slot_and_serial, visit, welcomed
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20


@contextmanager
def pair_with_hostile() -> Iterator[tuple[Lane, Reader, socket.socket]]:
    """An open lane, an honest reader 0 and the bare connection of reader 1."""
    with Lane({"tp": 2}, capacity=32 * MIB) as lane, Reader("tp") as reader, admitted(lane, "tp", 1) as hostile:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        yield lane, reader, hostile


def serve(lane: Lane, reader: Reader, hostile: socket.socket) -> None:
    """A tensor travels to the honest reader, and the other releases its ticket."""
    tensor = new_tensor()
    ticket = put(lane, tensor)
    assert torch.equal(reader.take(ticket), tensor)
    hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
    eventually(lambda: lane.stats().tickets == 0, "the ticket ends")


def test_a_reader_releases_only_what_it_owes() -> None:
    """Before it is issued, after it ended, with another serial, slots that there are not (2)."""
    with pair_with_hostile() as (lane, reader, hostile):
        held, tensor = reader.take(put(lane, first := new_tensor())), new_tensor()
        ticket = put(lane, tensor)
        slot, serial = slot_and_serial(ticket)
        malformed = 0
        for kind in (protocol.RELEASE, protocol.NOT_SEEN):
            for never_issued in (
                [(slot, serial + 1)],
                [(slot + 1, serial + 1)],
                [(HUGE, HUGE)],
                [(slot, 0)],
                [(0, 0)] * protocol.PAIRS,
            ):
                hostile.send(protocol.pairs(kind, never_issued))
                malformed += 1
            for not_owed in ([(slot + 1, serial)], [(slot, serial - 1)], [(1 << 16, serial)], [(HUGE, serial)]):
                hostile.send(protocol.pairs(kind, not_owed))  # issued, but not there
            stats = lane.stats()
            assert (stats.malformed_messages, stats.tickets, stats.lost_tickets) == (malformed, 2, 0)

        hostile.send(protocol.pairs(protocol.RELEASE, [(slot, serial)] * 3))
        hostile.send(protocol.pairs(protocol.NOT_SEEN, [(slot, serial)]))  # twice is no more than once
        stats = lane.stats()
        assert (stats.tickets, stats.malformed_messages, stats.lost_tickets) == (2, malformed, 0)
        assert torch.equal(held, first) and torch.equal(reader.take(ticket), tensor)
        assert lane.stats().tickets == 1  # the second is ended by both

        hostile.send(protocol.pairs(protocol.RELEASE, [(slot, serial)]))
        stats = lane.stats()
        assert (stats.tickets, stats.malformed_messages) == (1, malformed)
        assert torch.equal(held, first)


def test_a_ticket_that_one_reader_never_saw_is_lost_once_the_other_has_released_it() -> None:
    """Not before: it is out as long as the other may have it (3)."""
    with pair_with_hostile() as (lane, reader, hostile):
        ticket, _ = put(lane, tensor := new_tensor()), put(lane, new_tensor())
        hostile.send(protocol.pairs(protocol.NOT_SEEN, [slot_and_serial(ticket)]))
        stats = lane.stats()
        assert (stats.tickets, stats.lost_tickets) == (2, 0)

        assert torch.equal(reader.take(ticket), tensor)
        eventually(lambda: lane.stats().tickets == 1, "the ticket ends")
        stats = lane.stats()
        assert (stats.lost_tickets, stats.malformed_messages) == (1, 0)


def test_the_valid_half_of_a_malformed_message_is_handled() -> None:
    """And counted once as malformed."""
    with pair_with_hostile() as (lane, reader, hostile):
        ticket = put(lane, new_tensor())
        reader.discard(ticket)
        hostile.send(protocol.pairs(protocol.RELEASE, [(HUGE, HUGE), slot_and_serial(ticket), (0, 0)]))
        eventually(lambda: lane.stats().tickets == 0, "the ticket ends")
        assert lane.stats().malformed_messages == 1


WORDS_FOR_A_LANE = {
    "an empty message": b"",
    "a longer one than there are": protocol.pairs(protocol.RELEASE, [(1, 1)] * 1000),
    "random bytes": b"\xf3\x00\x91garbage",
    "half a pair": bytes((protocol.RELEASE,)) + b"12345678",
    "no pairs": bytes((protocol.RELEASE,)),
    "a HELLO": protocol.hello(bytes(32), "tp", 0, "n"),
    "a reason": protocol.reject("no more"),
    **{name: protocol.pairs(kind, [(1, 1)]) for name, kind in KINDS.items() if kind != protocol.MAPPED},
    **{f"{name} without pairs": bytes((kind,)) for name, kind in KINDS.items() if kind != protocol.MAPPED},
}


@pytest.mark.parametrize("word", WORDS_FOR_A_LANE.values(), ids=WORDS_FOR_A_LANE.keys())
def test_a_reader_that_talks_nonsense_is_counted_and_kept(caplog: pytest.LogCaptureFixture, word: bytes) -> None:
    """It may hold tensors, so it is not cut off; the log says so once."""
    with pair_with_hostile() as (lane, reader, hostile):
        ticket = put(lane, new_tensor())
        hostile.send(word)
        assert lane.stats().malformed_messages == 1
        hostile.send(word)
        stats = lane.stats()
        assert (stats.malformed_messages, stats.joined, stats.tickets) == (2, {"tp": [0, 1]}, 1)
        eventually(lambda: [record for record in caplog.records if "malformed" in record.message], "a line")
        reader.discard(ticket)
        hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
        eventually(lambda: lane.stats().tickets == 0, "the ticket ends")
        assert lane.stats().malformed_messages == 2
    (line,) = [record.message for record in caplog.records if "malformed" in record.message]
    assert f"lane {lane.name} ignores a malformed message of reader 1 of 'tp'" in line and len(line) < 250


def test_an_empty_message_is_not_the_end_of_a_reader() -> None:
    with pair_with_hostile() as (lane, reader, hostile):
        ticket = put(lane, new_tensor())
        hostile.send(b"")
        hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
        reader.discard(ticket)
        eventually(lambda: lane.stats().tickets == 0, "the ticket ends")
        assert (lane.stats().malformed_messages, lane.state) == (1, "open")


def test_a_second_mapped_message_changes_nothing() -> None:
    """A reader whose join was interrupted says it twice."""
    with pair_with_hostile() as (lane, reader, hostile):
        hostile.send(MAPPED)
        stats = lane.stats()
        assert (stats.malformed_messages, stats.joined, stats.state) == (0, {"tp": [0, 1]}, "open")
        serve(lane, reader, hostile)


def test_the_last_release_of_a_reader_counts() -> None:
    """Until the lane hears of its end, which closes it (4)."""
    with pair_with_hostile() as (lane, reader, hostile):
        tickets = [put(lane, new_tensor()) for _ in range(2)]
        gate = Gate("accept.connected")  # the lane's own thread does not hear of the end
        with visit(lane.name):
            gate.wait()
            for ticket in tickets:
                reader.discard(ticket)
                hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
            hostile.close()
            eventually(lambda: lane.stats().tickets == 0, "the tickets end")
            assert lane.stats().malformed_messages == 0
            gate.open()
        eventually(lambda: lane.is_closed, "its end")


def test_the_last_release_of_a_reader_that_did_not_read_counts() -> None:
    """Its end with messages unread is a reset. Its RELEASE names the group all the same (2, 4)."""
    with Lane({"a": 1, "b": 1}, capacity=32 * MIB) as lane, Reader("b") as reader, admitted(lane, "a") as deaf:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        ticket = put(lane, new_tensor())
        lane.recall(ticket)
        lane.housekeeping.look()  # RECALL is in its socket
        gate = Gate("accept.connected")  # the lane's own thread does not hear of the end
        with visit(lane.name):
            gate.wait()
            deaf.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
            deaf.close()
            eventually(lambda: lane.stats().tickets == 0, "the ticket ends")
            assert lane.stats().malformed_messages == 0
            gate.open()
        eventually(lambda: lane.is_closed, "its end")


def chatter(pipe: Connection, invitation: Invitation) -> None:
    """Join, and from then on say the same nonsense without end, six at a time."""
    connection = welcomed(invitation, "tp", 1)
    connection.send(MAPPED)
    word = protocol.pairs(protocol.RELEASE, [(1, 1)])
    for _ in range(5):
        if os.fork() == 0:
            die_with_the_parent()
            break
    else:
        pipe.send("talking")
    with suppress(BrokenPipeError):
        while True:
            connection.send(word)
    os._exit(0)


def test_a_reader_that_never_stops_talking_does_not_keep_a_put() -> None:
    """What arrives while the lane listens waits for the next time."""
    with Lane({"tp": 2}) as lane, Reader("tp") as reader, Child(chatter, lane.invitation) as child:
        reader.join(lane.invitation)
        assert child.hear() == "talking"
        assert lane.wait_open(DEADLINE)
        eventually(lambda: lane.stats().malformed_messages > 0, "nonsense")
        for _ in range(50):
            before = lane._issuer.malformed_messages
            lane.drain()
            assert lane._issuer.malformed_messages - before <= inbox.ALL
        ticket = put(lane, tensor := new_tensor())
        assert torch.equal(reader.take(ticket), tensor)


class Conversation(RuleBasedStateMachine):
    """One honest reader and one that says anything, against a model of who owes what (2), and what is lost (3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = ExitStack()
        self.issued: list[tuple[bytes, torch.Tensor]] = []
        self.honest: set[int] = set()  # numbers of tickets not released by the honest reader
        self.hostile: set[int] = set()  # and by the other
        self.held: dict[int, torch.Tensor] = {}
        self.copies: list[tuple[Reservation, torch.Tensor]] = []
        self.unseen: set[int] = set()  # those that the other owed and said it never saw
        self.malformed_messages = 0

    @initialize()
    def join(self) -> None:
        logging.getLogger("mmlane.lane").setLevel(logging.ERROR)
        self.scope.callback(logging.getLogger("mmlane.lane").setLevel, logging.NOTSET)
        self.lane = self.scope.enter_context(Lane({"tp": 2}, capacity=4 * MIB, segment=65536))
        self.other = self.scope.enter_context(admitted(self.lane, "tp", 1))
        self.reader = self.scope.enter_context(Reader("tp"))
        self.reader.join(self.lane.invitation)
        assert self.lane.wait_open(DEADLINE)

    @rule(elements=st.integers(0, 40_000))
    def put(self, elements: int) -> None:
        tensor = new_tensor(elements)
        self.issue(self.lane.put(tensor), tensor)

    @rule(elements=st.integers(0, 40_000))
    def copy(self, elements: int) -> None:
        """One copy for several tickets."""
        tensor = new_tensor(elements)
        copy = self.lane.copy(tensor)
        if isinstance(copy, Refused):
            self.issue(copy, tensor)
        else:
            self.copies.append((copy, tensor))

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        if self.copies:
            copy, tensor = self.copies[data.draw(st.integers(0, len(self.copies) - 1))]
            self.issue(copy.publish(), tensor)

    def issue(self, ticket: bytes | Refused, tensor: torch.Tensor) -> None:
        if isinstance(ticket, Refused):
            assert ticket.cause == "full" and (self.honest | self.hostile or self.copies), ticket
        else:
            self.honest.add(len(self.issued))
            self.hostile.add(len(self.issued))
            self.issued.append((ticket, tensor))

    @rule(data=st.data(), close=st.booleans())
    def end_a_copy(self, data: st.DataObject, close: bool) -> None:
        if self.copies:
            copy, _ = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
            if close:
                copy.close()

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        left = sorted(self.honest - set(self.held))
        if left:
            number = data.draw(st.sampled_from(left))
            tensor = self.reader.take(self.issued[number][0])
            if tensor.numel():
                self.held[number] = tensor
            else:
                self.honest.discard(number)  # nothing to hold

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if self.held:
            number = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[number]
            self.honest.discard(number)

    @rule(data=st.data(), kind=st.sampled_from([protocol.RELEASE, protocol.NOT_SEEN]))
    def say_about_tickets(self, data: st.DataObject, kind: int) -> None:
        known = [slot_and_serial(ticket) for ticket, _ in self.issued]
        numbers = st.integers(0, HUGE)
        pair = st.tuples(numbers, numbers)
        if known:
            one = st.sampled_from(known)
            near = st.builds(
                lambda of, slot, serial: (abs(of[0] + slot), of[1] + serial), one, *[st.integers(-1, 1)] * 2
            )
            pair = one | near | pair
        items = data.draw(st.lists(pair, min_size=1, max_size=6))
        self.other.send(protocol.pairs(kind, items))
        for item in items:
            number = known.index(item) if item in known else -1
            if number in self.hostile:
                self.hostile.discard(number)
                if kind == protocol.NOT_SEEN:
                    self.unseen.add(number)
        self.malformed_messages += not {serial for _, serial in items} <= {serial for _, serial in known}

    @rule(
        kind=st.integers(0, 255).filter(
            lambda kind: kind not in (protocol.RELEASE, protocol.NOT_SEEN, protocol.MAPPED)
        ),
        items=st.lists(st.tuples(st.integers(0, HUGE), st.integers(0, HUGE)), max_size=5),
    )
    def say_anything(self, kind: int, items: list[tuple[int, int]]) -> None:
        self.other.send(protocol.pairs(kind, items))
        self.malformed_messages += 1

    @rule(
        noise=st.binary(max_size=200).filter(lambda noise: len(noise) % 16 != 1 and not noise.startswith(MAPPED))
    )
    def make_noise(self, noise: bytes) -> None:
        self.other.send(noise)
        self.malformed_messages += 1

    @rule()
    def look(self) -> None:
        self.lane.housekeeping.look()

    @invariant()
    def the_state_is_right(self) -> None:
        if not hasattr(self, "lane"):
            return
        # The honest reader's thread may be sending what was released here.
        eventually(lambda: self.lane.stats().tickets == len(self.honest | self.hostile), "what was released")
        stats = self.lane.stats()
        lost = self.unseen - self.honest  # they have ended, whichever reader answered last (3)
        assert (stats.malformed_messages, stats.lost_tickets) == (self.malformed_messages, len(lost))
        assert (stats.joined, stats.state) == ({"tp": [0, 1]}, "open")

    @invariant()
    def nothing_is_freed_wrongly(self) -> None:
        for number, tensor in self.held.items():
            assert torch.equal(tensor, self.issued[number][1])

    def teardown(self) -> None:
        with self.scope:
            if not hasattr(self, "lane"):
                return
            for number in sorted(self.honest - set(self.held)):
                assert torch.equal(self.reader.take(self.issued[number][0]), self.issued[number][1])
            for number in sorted(self.hostile):
                self.other.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(self.issued[number][0])]))
            self.held.clear()
            self.copies.clear()
            self.issued.clear()
            eventually(lambda: self.lane.stats().tickets == 0, "what was released")
            stats = self.lane.stats()
            assert (stats.tickets, stats.used_bytes, stats.extents) == (0, 0, 0)
            self.other.close()
            eventually(lambda: self.lane.is_closed, "its end")


Conversation.TestCase.settings = settings(
    max_examples=examples(300, 3000), stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
TestConversation = pytest.mark.long(Conversation.TestCase)
