"""Readers that joined by the rules and then say anything: they break nothing, and the lane serves on.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmlane.lane import Lane, Reader, Share, control, wire
from tests.effort import examples
from tests.lane.harness.child import Child, die_with_the_parent
from tests.lane.harness.sockets import HUGE, KINDS, MAPPED, admitted, receive, slot_and_serial, visit
from tests.lane.harness.together import new_tensor, put, serves
from tests.lane.harness.waiting import eventually

MIB = 1 << 20


def test_a_reader_gives_back_only_what_it_owes(lane: Lane) -> None:
    """Twice, before it is issued, after it ended, with another serial, slots that there are not (2)."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.invitation)
        kept, tensor = reader.take(put(lane, first := new_tensor())), new_tensor()
        ticket = put(lane, tensor)
        slot, serial = slot_and_serial(ticket)
        strays = 0
        for kind in (protocol.RELEASE, protocol.NOT_SEEN):
            nonsense = [
                (slot, serial + 1),
                (slot + 1, serial),
                (slot + 1, serial + 1),
                (slot, serial - 1),
                (1 << 16, serial),
                (HUGE, HUGE),
                (slot, 0),
            ]
            hostile.send(protocol.pairs(kind, nonsense))
            strays += len(nonsense)
            assert lane.stats().malformed_messages == strays
        assert lane.stats().tickets == 2

        hostile.send(protocol.pairs(protocol.RELEASE, [(slot, serial)] * 3))
        strays += 2
        hostile.send(protocol.pairs(protocol.NOT_SEEN, [(slot, serial)]))
        strays += 1
        stats = lane.stats()
        assert (stats.tickets, stats.malformed_messages) == (2, strays)
        assert torch.equal(kept, first) and torch.equal(reader.take(ticket), tensor)
        assert lane.stats().tickets == 1  # the second is ended by both

        hostile.send(protocol.pairs(protocol.RELEASE, [(slot, serial)]))
        assert lane.stats().malformed_messages == strays + 1
        hostile.close()
        eventually(lambda: lane.stats().readers == {"tp": 1}, "its end")
        del kept
        serves(lane, reader)


@pytest.mark.parametrize("offsets", ["of this lane", "of no lane"])
def test_agreeing_to_what_was_not_asked_frees_nothing(lane: Lane, offsets: str) -> None:
    """COOLED for memory in use, at every look: what is taken is not handed back (2)."""
    with Lane({"tp": 2}, capacity=32 * MIB, idle=0.05) as lane, Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.invitation)
        tensor = new_tensor(MIB)
        held = reader.take(put(lane, tensor))
        base, segment = protocol.read_welcome(lane._control._welcome)[2] * 8, 4 * MIB
        places = range(base, base + 32 * MIB, segment) if offsets == "of this lane" else (0, 5, base + 1, HUGE)
        deadline = time.monotonic() + 0.5  # ten looks
        sent = 0
        while time.monotonic() < deadline:
            hostile.send(protocol.pairs(protocol.COOLED, [(place, segment) for place in places]))
            sent += len(places)
            stats = lane.stats()
            assert stats.malformed_messages == (0 if offsets == "of this lane" else sent)
        assert torch.equal(held, tensor) and stats.committed_bytes >= tensor.nbytes
        del held
        hostile.send(protocol.pairs(protocol.RELEASE, [(0, 0)]))


WORDS_FOR_A_LANE = {
    "an empty message": b"",
    "a longer one than there are": protocol.pairs(protocol.RELEASE, [(1, 1)] * 1000),
    "random bytes": b"\xf3\x00\x91garbage",
    "half a pair": bytes((protocol.RELEASE,)) + b"12345678",
    "no pairs": bytes((protocol.RELEASE,)),
    **{
        name: protocol.pairs(kind, [(1, 1)])
        for name, kind in KINDS.items()
        if kind not in (protocol.RELEASE, protocol.NOT_SEEN)
    },
    **{f"{name} without pairs": bytes((kind,)) for name, kind in KINDS.items()},
}


@pytest.mark.parametrize("word", WORDS_FOR_A_LANE.values(), ids=WORDS_FOR_A_LANE.keys())
def test_a_reader_that_talks_nonsense_is_counted_and_kept(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes
) -> None:
    """It may hold tensors, so it is not cut off; the log says so once."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.invitation)
        ticket = put(lane, new_tensor())
        hostile.send(word)
        assert lane.stats().malformed_messages == 1
        hostile.send(word)
        stats = lane.stats()
        assert (stats.malformed_messages, stats.readers, stats.tickets) == (2, {"tp": 2}, 1)
        assert sum("made no sense" in record.message for record in caplog.records) == 1
        reader.discard(ticket)
        hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
        stats = lane.stats()
        assert (stats.malformed_messages, stats.tickets) == (2, 0)


def test_the_last_words_of_a_reader_count(lane: Lane) -> None:
    """An empty message among them is not its end (4)."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.invitation)
        tickets = [put(lane, new_tensor()) for _ in range(2)]
        hostile.send(b"")
        for ticket in tickets:
            reader.discard(ticket)
            hostile.send(protocol.pairs(protocol.RELEASE, [slot_and_serial(ticket)]))
        hostile.close()
        eventually(lambda: lane.stats().readers == {"tp": 1}, "its end")
        assert lane.stats().tickets == 0


def test_the_last_words_of_a_reader_that_did_not_listen_count() -> None:
    """Its end with messages unread is a reset of the connection. Its DONE names the group all the same (2, 4)."""
    with Lane({"a": 1, "b": 1}, capacity=32 * MIB) as lane, Reader("b") as reader, admitted(lane, "a") as deaf:
        reader.join(lane.invitation)
        deaf.send(
            protocol.pairs(protocol.RELEASE, [slot_and_serial(put(lane, new_tensor()))])
        )  # WARM is in its socket
        deaf.close()
        eventually(lambda: lane.stats().readers == {"b": 1}, "its end")
        stats = lane.stats()
        assert (stats.tickets, stats.malformed_messages) == (0, 0)


def chatter(pipe: Connection, address: str) -> None:
    """Join, and from then on say the same nonsense without end, six at a time."""
    connection = visit(address)
    connection.send(protocol.hello("tp"))
    receive(connection)
    connection.send(MAPPED)
    receive(connection)
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


def test_a_reader_that_never_stops_talking_does_not_keep_a_put(lane: Lane) -> None:
    """What arrives while the lane listens waits for the next time."""
    with Reader("tp") as reader, Child(chatter, lane.address) as child:
        reader.join(lane.invitation)
        assert child.hear() == "talking"
        eventually(lambda: lane.stats().malformed_messages > 0, "nonsense")
        for _ in range(50):
            before = lane._strays
            lane.drain()
            assert lane._strays - before <= control._AT_ONCE
        ticket = put(lane, tensor := new_tensor())
        assert torch.equal(reader.take(ticket), tensor)


class Conversation(RuleBasedStateMachine):
    """One honest reader and one that says anything, against a model of who owes what (2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = ExitStack()
        self.issued: list[tuple[bytes, torch.Tensor]] = []
        self.honest: set[int] = set()  # numbers of tickets not given back by the honest reader
        self.hostile: set[int] = set()  # and by the other
        self.held: dict[int, torch.Tensor] = {}
        self.shares: list[tuple[Share, torch.Tensor]] = []
        self.malformed_messages = self.lost_tickets = 0

    @initialize()
    def join(self) -> None:
        logging.getLogger("mmlane.lane").setLevel(logging.ERROR)
        self.scope.callback(logging.getLogger("mmlane.lane").setLevel, logging.NOTSET)
        self.lane = self.scope.enter_context(Lane({"tp": 2}, capacity=4 * MIB, segment=65536))
        self.other = self.scope.enter_context(admitted(self.lane))
        self.reader = self.scope.enter_context(Reader("tp"))
        self.reader.join(self.lane.invitation)
        self.base = protocol.read_welcome(self.lane._control._welcome)[2] * 8

    @rule(elements=st.integers(0, 40_000), uses=st.integers(0, 3))
    def put(self, elements: int, uses: int) -> None:
        tensor = new_tensor(elements)
        share = self.lane.share(uses) if uses else None
        self.check_put(tensor, share)
        if share is not None:
            self.shares.append((share, tensor))

    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        """Within the uses of a share, or beyond them."""
        if self.shares:
            share, tensor = self.shares[data.draw(st.integers(0, len(self.shares) - 1))]
            self.check_put(tensor, share)

    def check_put(self, tensor: torch.Tensor, share: Share | None) -> None:
        ticket = self.lane.put(tensor, share=share)
        if isinstance(ticket, bytes):
            self.honest.add(len(self.issued))
            self.hostile.add(len(self.issued))
            self.issued.append((ticket, tensor))
        else:
            assert ticket.cause == "full" and (self.honest | self.hostile or self.shares), ticket

    @rule(data=st.data(), close=st.booleans())
    def end_a_share(self, data: st.DataObject, close: bool) -> None:
        if self.shares:
            share, _ = self.shares.pop(data.draw(st.integers(0, len(self.shares) - 1)))
            if close:
                share.close()

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
                self.lost_tickets += kind == protocol.NOT_SEEN and number not in self.honest
            else:
                self.malformed_messages += 1

    @rule(
        kind=st.sampled_from(
            [kind for kind in KINDS.values() if kind not in (protocol.RELEASE, protocol.NOT_SEEN, protocol.COOLED)]
        )
        | st.integers(12, 255)
        | st.just(0),
        items=st.lists(st.tuples(st.integers(0, HUGE), st.integers(0, HUGE)), max_size=5),
    )
    def say_anything(self, kind: int, items: list[tuple[int, int]]) -> None:
        self.other.send(protocol.pairs(kind, items))
        self.malformed_messages += len(items) or 1

    @rule(segment=st.integers(0, 63))
    def agree_to_anything(self, segment: int) -> None:
        self.other.send(protocol.pairs(protocol.COOLED, [(self.base + segment * 65536, 65536)]))

    @rule(noise=st.binary(max_size=200).filter(lambda noise: len(noise) % 16 != 1))
    def make_noise(self, noise: bytes) -> None:
        self.other.send(noise)
        self.malformed_messages += 1

    @rule()
    def look(self) -> None:
        self.lane.look()

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "lane"):
            return
        # Where the honest reader's thread is answering, it sends for us what we gave back meanwhile.
        eventually(lambda: self.lane.stats().tickets == len(self.honest | self.hostile), "what was given back")
        stats = self.lane.stats()
        assert stats.tickets == len(self.honest | self.hostile)
        assert (stats.malformed_messages, stats.readers, stats.lost_tickets) == (
            self.malformed_messages,
            {"tp": 2},
            self.lost_tickets,
        )

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
            self.other.close()
            self.held.clear()
            eventually(lambda: self.lane.stats().readers == {"tp": 1}, "its end")
            self.shares.clear()
            self.issued.clear()
            eventually(lambda: self.lane.stats().tickets == 0, "what was given back")
            stats = self.lane.stats()
            assert (stats.tickets, stats.used_bytes, stats.extents) == (0, 0, 0)


Conversation.TestCase.settings = settings(
    max_examples=examples(300, 3000), stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
TestConversation = pytest.mark.long(Conversation.TestCase)
