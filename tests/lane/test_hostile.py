"""Whoever connects to a lane, and whatever they say: they get nothing, break nothing, and the lane serves on."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmlane.lane import JoinRefused, Lane, LaneError, Reader, Share, StaleTicket, control, ticket, wire
from tests.lane.sandbox import (
    DEADLINE,
    NOBODY,
    Child,
    become,
    descriptors,
    in_a_thread,
    limit,
    limit_descriptors,
    listen,
    live_no_longer_than_the_parent,
    receive,
    require_other_users,
    run,
    visit,
    wait_until,
)

MIB = 1 << 20
HUGE = (1 << 64) - 1
_KINDS = ("HELLO", "WELCOME", "SORRY", "MAPPED", "DONE", "FORGONE", "WARM", "COLD", "COOLED", "REVOKE", "JOINED")
KINDS: dict[str, int] = {name: getattr(wire, name) for name in _KINDS}
MAPPED = bytes((wire.MAPPED,))


@pytest.fixture
def lane() -> Iterator[Lane]:
    with Lane({"tp": 1}, capacity=32 * MIB) as lane:
        yield lane


def put(lane: Lane, tensor: torch.Tensor) -> bytes:
    """A ticket, and nothing else."""
    ticket = lane.put(tensor)
    assert isinstance(ticket, bytes), ticket
    return ticket


_numbers = count()


def new_tensor(elements: int = 3000) -> torch.Tensor:
    """A tensor like no other."""
    return torch.arange(elements, dtype=torch.int64) * 1000 + next(_numbers)


def serves(lane: Lane, *readers: Reader) -> None:
    """Whether a tensor travels: the lane has come to no harm."""
    tensor = new_tensor()
    ticket = put(lane, tensor)
    for reader in readers:
        assert torch.equal(reader.take(ticket), tensor)
    assert lane.stats().tickets == 0


def admitted(lane: Lane, group: str = "tp") -> socket.socket:
    """A bare connection of somebody who has joined by the rules."""
    before = sum(lane.stats().readers.values())
    connection = visit(lane.address)
    connection.send(wire.hello(group))
    welcome, fds = receive(connection)
    assert wire.kind(welcome) == wire.WELCOME and len(fds) == 1
    os.close(fds[0])
    connection.send(MAPPED)
    joined, none = receive(connection)
    assert wire.kind(joined) == wire.JOINED and not none
    assert sum(lane.stats().readers.values()) == before + 1
    return connection


def slot_and_serial(of: bytes) -> tuple[int, int]:
    content = ticket.read(of)
    return content.slot, content.serial


# --- another user ------------------------------------------------------------------------------------------


def visit_as_nobody(pipe: Connection, address: str, producer: int) -> tuple[bytes, int, list[str]]:
    """Connect and say all the right things. Returns the answer, and what descriptors came of it."""
    become(NOBODY)
    with visit(address) as connection:
        with suppress(BrokenPipeError):  # sent away before it could say a word
            connection.send(wire.hello("tp"))
        answer, fds = receive(connection)
    found = []
    for number in range(256):
        try:
            os.close(os.open(f"/proc/{producer}/fd/{number}", os.O_RDONLY))
        except OSError:
            continue
        found.append(f"/proc/{producer}/fd/{number}")
    return answer, len(fds), found


def test_another_user_is_sent_away_empty_handed(lane: Lane) -> None:
    require_other_users()
    with Child(visit_as_nobody, lane.address, os.getpid()) as child:
        assert child.result() == (b"", 0, [])
    assert lane.stats().strangers == 1
    with Reader("tp") as reader:
        reader.join(lane.address)
        serves(lane, reader)


def listen_as_nobody(pipe: Connection, address: str) -> bytes:
    """Wait where a lane would be. Returns what the visitor says."""
    become(NOBODY)
    with listen(address) as listener:
        pipe.send("listening")
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE)
            return receive(connection)[0]


def test_a_reader_tells_nothing_to_another_user() -> None:
    require_other_users()
    address = f"mmlane-test-{secrets.token_hex(8)}"
    with Child(listen_as_nobody, address) as child, Reader("tp") as reader:
        assert child.hear() == "listening"
        with pytest.raises(JoinRefused, match=f"belongs to user {NOBODY}, this is user 0"):
            reader.join(address)
        assert child.result() == b""
        assert reader.lanes() == ()


def travel(uid: int) -> bool:
    become(uid)
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.address)
        serves(lane, reader)
    return True


@pytest.mark.parametrize("uid", [NOBODY, 3_000_000_000])
def test_user_numbers_use_all_32_bits(uid: int) -> None:
    require_other_users()
    assert run(travel, uid)


# --- visitors ----------------------------------------------------------------------------------------------

GARBAGE: dict[str, list[bytes]] = {
    "an empty message": [b""],
    "random bytes": [b"\xf3\x00\x91garbage"],
    "a long message": [b"\x01" + b"x" * 100_000],
    "a long greeting": [wire.hello("tp" * 50_000)],
    "a greeting cut short": [bytes((wire.HELLO,))],
    "another version": [bytes((wire.HELLO,)) + struct.pack("<H", wire.VERSION + 1) + b"tp"],
    "an unknown group": [wire.hello("pp")],
    "an empty group": [wire.hello("")],
    "a group that is no text": [wire.hello("") + b"\xff\xfe"],
    "a group with a newline": [wire.hello("tp\nlane x serves on")],
    "nothing": [],
    **{f"{name} first": [bytes((kind,))] for name, kind in KINDS.items()},
    **{f"{name} with pairs first": [wire.pairs(kind, [(0, 0), (HUGE, HUGE)])] for name, kind in KINDS.items()},
}


@pytest.mark.parametrize("words", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_visitor_that_talks_nonsense_gets_nothing(lane: Lane, words: list[bytes]) -> None:
    before = descriptors()
    with visit(lane.address) as connection:
        for word in words:
            connection.send(word)
        if not words:
            connection.shutdown(socket.SHUT_WR)
        answer, fds = receive(connection)
        assert not fds and (not answer or wire.kind(answer) == wire.SORRY)
        assert receive(connection) == (b"", [])  # hung up
    wait_until(lambda: lane.stats().strangers == 1, "a stranger")
    assert not descriptors() - before
    with Reader("tp") as reader:
        reader.join(lane.address)
        serves(lane, reader)
    assert lane.stats().strays == 0


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (bytes((wire.HELLO,)) + struct.pack("<H", wire.VERSION + 7) + b"tp", "run one version of mmlane"),
        (wire.hello("pp"), "unknown group 'pp', expected 'tp'"),
    ],
)
def test_a_visitor_that_is_mistaken_is_told_why(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes, reason: str
) -> None:
    with caplog.at_level(logging.INFO, "mmlane.lane"), visit(lane.address) as connection:
        connection.send(word)
        answer, _ = receive(connection)
        assert reason in wire.read_sorry(answer)
        assert receive(connection) == (b"", [])
    assert [reason in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "word",
    [
        wire.hello("tp"),
        *(bytes((kind,)) for kind in (0, 255, *KINDS.values()) if kind != wire.MAPPED),
    ],
)
def test_a_greeting_is_followed_by_mapped_or_the_end(lane: Lane, word: bytes) -> None:
    with visit(lane.address) as connection:
        connection.send(wire.hello("tp"))
        _, fds = receive(connection)
        os.close(*fds)
        connection.send(word)
        answer, fds = receive(connection)
        assert not fds and wire.kind(answer) == wire.SORRY
        assert receive(connection) == (b"", [])
    stats = lane.stats()
    assert (stats.strangers, stats.readers, stats.is_open) == (1, {}, False)


def test_a_group_can_have_an_empty_name() -> None:
    with Lane({"": 1}, capacity=4 * MIB) as lane, Reader("") as reader:
        reader.join(lane.address)
        serves(lane, reader)


def test_a_crowd_that_says_nothing_keeps_others_out_only_while_it_is_there(lane: Lane) -> None:
    """Its places are free again when it leaves; who came in vain is told what may be the matter."""
    before = descriptors()
    crowd = [visit(lane.address) for _ in range(control._PENDING + 20)]
    wait_until(lambda: lane.stats().strangers == 20, "20 strangers")
    with Reader("tp") as reader:
        with pytest.raises(JoinRefused, match="too many wait"):
            reader.join(lane.address)
        assert lane.stats().strangers == 21
        for connection in crowd:
            connection.close()
        wait_until(lambda: lane.stats().strangers == len(crowd) + 1, "the end of the crowd")
        reader.join(lane.address)
        serves(lane, reader)
    del reader
    wait_until(lambda: not descriptors() - before, "the end of all connections")


def test_a_crowd_that_says_nothing_is_sent_away(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PATIENCE", 0.1)
    crowd = [visit(lane.address) for _ in range(control._PENDING)]
    for connection in crowd:
        answer, fds = receive(connection)
        assert not fds and wire.read_sorry(answer) == "nothing heard for 0.1 s"
        connection.close()
    assert lane.stats().strangers == len(crowd)
    with Reader("tp") as reader:
        reader.join(lane.address)
        serves(lane, reader)


def test_a_greeting_alone_does_not_keep_a_place(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the memory and never says MAPPED is sent away too."""
    monkeypatch.setattr(control, "_PATIENCE", 0.1)
    with visit(lane.address) as connection:
        connection.send(wire.hello("tp"))
        os.close(*receive(connection)[1])
        assert wire.kind(receive(connection)[0]) == wire.SORRY
    assert lane.stats().readers == {}


def test_descriptors_that_nobody_asked_for_go_nowhere(lane: Lane) -> None:
    with Reader("tp") as reader, tempfile.TemporaryFile() as file:
        reader.join(lane.address)
        before = descriptors()
        many = [file.fileno()] * 200
        with visit(lane.address) as connection:
            socket.send_fds(connection, [wire.hello("pp")], many)
            assert receive(connection)[1] == []
        with visit(lane.address) as connection:
            socket.send_fds(connection, [wire.hello("tp")], many)
            os.close(*receive(connection)[1])
            socket.send_fds(connection, [MAPPED], many)
            assert wire.kind(receive(connection)[0]) == wire.JOINED
            for kind in KINDS.values():
                socket.send_fds(connection, [wire.pairs(kind, [(1, 1)])], many)
            socket.send_fds(connection, [b""], many)
            assert lane.stats().readers == {"tp": 2}
            assert (descriptors() - before).total() == 2, "one end each"
        wait_until(lambda: lane.stats().readers == {"tp": 1}, "its end")
        assert not descriptors() - before
        serves(lane, reader)


def test_a_visitor_gets_memory_that_it_can_only_read(lane: Lane) -> None:
    """Written by the producer only, and never cut short under another reader (6)."""
    with visit(lane.address) as connection:
        connection.send(wire.hello("tp"))
        welcome, (fd,) = receive(connection)
        size = wire.read_welcome(welcome)[1]
        assert os.fstat(fd).st_size == size
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        for cut in (fd, lane._backing.fd):
            with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
                os.ftruncate(cut, size // 2)
        os.close(fd)


# --- readers -----------------------------------------------------------------------------------------------


def test_a_reader_gives_back_only_what_it_owes(lane: Lane) -> None:
    """Twice, before it is issued, after it ended, with another serial, slots that there are not (2)."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.address)
        kept, tensor = reader.take(put(lane, first := new_tensor())), new_tensor()
        ticket = put(lane, tensor)
        slot, serial = slot_and_serial(ticket)
        strays = 0
        for kind in (wire.DONE, wire.FORGONE):
            nonsense = [
                (slot, serial + 1),
                (slot + 1, serial),
                (slot + 1, serial + 1),
                (slot, serial - 1),
                (1 << 16, serial),
                (HUGE, HUGE),
                (slot, 0),
            ]
            hostile.send(wire.pairs(kind, nonsense))
            strays += len(nonsense)
            assert lane.stats().strays == strays
        assert lane.stats().tickets == 2

        hostile.send(wire.pairs(wire.DONE, [(slot, serial)] * 3))
        strays += 2
        hostile.send(wire.pairs(wire.FORGONE, [(slot, serial)]))
        strays += 1
        stats = lane.stats()
        assert (stats.tickets, stats.strays) == (2, strays)
        assert torch.equal(kept, first) and torch.equal(reader.take(ticket), tensor)
        assert lane.stats().tickets == 1  # the second is ended by both

        hostile.send(wire.pairs(wire.DONE, [(slot, serial)]))
        assert lane.stats().strays == strays + 1
        hostile.close()
        wait_until(lambda: lane.stats().readers == {"tp": 1}, "its end")
        del kept
        serves(lane, reader)


@pytest.mark.parametrize("offsets", ["of this lane", "of no lane"])
def test_agreeing_to_what_was_not_asked_frees_nothing(lane: Lane, offsets: str) -> None:
    """COOLED for memory in use, at every look: what is taken is not handed back (2)."""
    with Lane({"tp": 2}, capacity=32 * MIB, idle=0.05) as lane, Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.address)
        tensor = new_tensor(MIB)
        held = reader.take(put(lane, tensor))
        base, segment = wire.read_welcome(lane._control._welcome)[2] * 8, 4 * MIB
        places = range(base, base + 32 * MIB, segment) if offsets == "of this lane" else (0, 5, base + 1, HUGE)
        deadline = time.monotonic() + 0.5  # ten looks
        sent = 0
        while time.monotonic() < deadline:
            hostile.send(wire.pairs(wire.COOLED, [(place, segment) for place in places]))
            sent += len(places)
            stats = lane.stats()
            assert stats.strays == (0 if offsets == "of this lane" else sent)
        assert torch.equal(held, tensor) and stats.warm >= tensor.nbytes
        del held
        hostile.send(wire.pairs(wire.DONE, [(0, 0)]))


WORDS_FOR_A_LANE = {
    "an empty message": b"",
    "a longer one than there are": wire.pairs(wire.DONE, [(1, 1)] * 1000),
    "random bytes": b"\xf3\x00\x91garbage",
    "half a pair": bytes((wire.DONE,)) + b"12345678",
    "no pairs": bytes((wire.DONE,)),
    **{name: wire.pairs(kind, [(1, 1)]) for name, kind in KINDS.items() if kind not in (wire.DONE, wire.FORGONE)},
    **{f"{name} without pairs": bytes((kind,)) for name, kind in KINDS.items()},
}


@pytest.mark.parametrize("word", WORDS_FOR_A_LANE.values(), ids=WORDS_FOR_A_LANE.keys())
def test_a_reader_that_talks_nonsense_is_counted_and_kept(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes
) -> None:
    """It may hold tensors, so it is not cut off; the log says so once."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.address)
        ticket = put(lane, new_tensor())
        hostile.send(word)
        assert lane.stats().strays == 1
        hostile.send(word)
        stats = lane.stats()
        assert (stats.strays, stats.readers, stats.tickets) == (2, {"tp": 2}, 1)
        assert sum("made no sense" in record.message for record in caplog.records) == 1
        reader.discard(ticket)
        hostile.send(wire.pairs(wire.DONE, [slot_and_serial(ticket)]))
        stats = lane.stats()
        assert (stats.strays, stats.tickets) == (2, 0)


def test_the_last_words_of_a_reader_count(lane: Lane) -> None:
    """An empty message among them is not its end (4)."""
    with Reader("tp") as reader, admitted(lane) as hostile:
        reader.join(lane.address)
        tickets = [put(lane, new_tensor()) for _ in range(2)]
        hostile.send(b"")
        for ticket in tickets:
            reader.discard(ticket)
            hostile.send(wire.pairs(wire.DONE, [slot_and_serial(ticket)]))
        hostile.close()
        wait_until(lambda: lane.stats().readers == {"tp": 1}, "its end")
        assert lane.stats().tickets == 0


def test_the_last_words_of_a_reader_that_did_not_listen_count() -> None:
    """Its end with messages unread is a reset of the connection. Its DONE names the group all the same (2, 4)."""
    with Lane({"a": 1, "b": 1}, capacity=32 * MIB) as lane, Reader("b") as reader, admitted(lane, "a") as deaf:
        reader.join(lane.address)
        deaf.send(wire.pairs(wire.DONE, [slot_and_serial(put(lane, new_tensor()))]))  # WARM is in its socket
        deaf.close()
        wait_until(lambda: lane.stats().readers == {"b": 1}, "its end")
        stats = lane.stats()
        assert (stats.tickets, stats.strays) == (0, 0)


def chatter(pipe: Connection, address: str) -> None:
    """Join, and from then on say the same nonsense without end, six at a time."""
    connection = visit(address)
    connection.send(wire.hello("tp"))
    receive(connection)
    connection.send(MAPPED)
    receive(connection)
    word = wire.pairs(wire.DONE, [(1, 1)])
    for _ in range(5):
        if os.fork() == 0:
            live_no_longer_than_the_parent()
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
        reader.join(lane.address)
        assert child.hear() == "talking"
        wait_until(lambda: lane.stats().strays > 0, "nonsense")
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
        self.strays = self.orphans = 0

    @initialize()
    def join(self) -> None:
        logging.getLogger("mmlane.lane").setLevel(logging.ERROR)
        self.scope.callback(logging.getLogger("mmlane.lane").setLevel, logging.NOTSET)
        self.lane = self.scope.enter_context(Lane({"tp": 2}, capacity=4 * MIB, segment=65536))
        self.other = self.scope.enter_context(admitted(self.lane))
        self.reader = self.scope.enter_context(Reader("tp"))
        self.reader.join(self.lane.address)
        self.base = wire.read_welcome(self.lane._control._welcome)[2] * 8

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

    @rule(data=st.data(), kind=st.sampled_from([wire.DONE, wire.FORGONE]))
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
        self.other.send(wire.pairs(kind, items))
        for item in items:
            number = known.index(item) if item in known else -1
            if number in self.hostile:
                self.hostile.discard(number)
                self.orphans += kind == wire.FORGONE and number not in self.honest
            else:
                self.strays += 1

    @rule(
        kind=st.sampled_from(
            [kind for kind in KINDS.values() if kind not in (wire.DONE, wire.FORGONE, wire.COOLED)]
        )
        | st.integers(12, 255)
        | st.just(0),
        items=st.lists(st.tuples(st.integers(0, HUGE), st.integers(0, HUGE)), max_size=5),
    )
    def say_anything(self, kind: int, items: list[tuple[int, int]]) -> None:
        self.other.send(wire.pairs(kind, items))
        self.strays += len(items) or 1

    @rule(segment=st.integers(0, 63))
    def agree_to_anything(self, segment: int) -> None:
        self.other.send(wire.pairs(wire.COOLED, [(self.base + segment * 65536, 65536)]))

    @rule(noise=st.binary(max_size=200).filter(lambda noise: len(noise) % 16 != 1))
    def make_noise(self, noise: bytes) -> None:
        self.other.send(noise)
        self.strays += 1

    @rule()
    def look(self) -> None:
        self.lane.look()

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "lane"):
            return
        # Where the honest reader's thread is answering, it sends for us what we gave back meanwhile.
        wait_until(lambda: self.lane.stats().tickets == len(self.honest | self.hostile), "what was given back")
        stats = self.lane.stats()
        assert stats.tickets == len(self.honest | self.hostile)
        assert (stats.strays, stats.readers, stats.orphans) == (self.strays, {"tp": 2}, self.orphans)

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
            wait_until(lambda: self.lane.stats().readers == {"tp": 1}, "its end")
            self.shares.clear()
            self.issued.clear()
            wait_until(lambda: self.lane.stats().tickets == 0, "what was given back")
            stats = self.lane.stats()
            assert (stats.tickets, stats.taken, stats.extents) == (0, 0, 0)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    max_examples=300, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- producers ---------------------------------------------------------------------------------------------


@contextmanager
def impostor(behave: Callable[[socket.socket], object], visitors: int = 1) -> Iterator[str]:
    """Somebody of this user who listens as a lane does, and does with each visitor as he likes."""
    address = f"mmlane-test-{secrets.token_hex(8)}"

    def serve() -> None:
        for _ in range(visitors):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                behave(connection)

    with listen(address) as listener, in_a_thread(serve):
        yield address


def until_it_hangs_up(connection: socket.socket) -> list[bytes]:
    """All that a visitor still says."""
    heard = []
    while message := receive(connection)[0]:
        heard.append(message)
    return heard


def file_of(nbytes: int) -> int:
    """Sealed memory, as a lane's."""
    fd = os.memfd_create("mmlane-test")
    os.ftruncate(fd, nbytes)
    return fd


BASE = 1 << 19
SIZE = BASE + MIB
NONE = "/nowhere/at/all"

# An answer to a greeting: the message and what descriptor to send with it.
Answer = tuple[bytes, Callable[[], int] | None]
WELCOMES: dict[str, Answer] = {
    "an empty message": (b"", None),
    "random bytes": (b"\xf3\x00\x91garbage", None),
    "a long message": (b"\x02" * 100_000, None),
    "a welcome cut short": (bytes((wire.WELCOME,)) + b"\x01\x00", None),
    "a welcome whose path is no text": (wire.welcome(SIZE, 65536, "") + b"\xff", None),
    "another version": (bytes((wire.WELCOME,)) + struct.pack("<HQI", 99, SIZE, 65536), lambda: file_of(SIZE)),
    "sorry, in no language": (bytes((wire.SORRY,)) + b"\xff\xfe", None),
    "mapped": (MAPPED, lambda: file_of(SIZE)),
    "no descriptor, and a path to nothing": (wire.welcome(SIZE, 65536, NONE), None),
    "no descriptor, and no path": (wire.welcome(SIZE, 65536, ""), None),
    "no descriptor, and half a path": (wire.welcome(SIZE, 65536, "/dev/\0null"), None),
    "no descriptor, and a directory": (wire.welcome(SIZE, 65536, "/tmp"), None),
    "no descriptor, and a device": (wire.welcome(SIZE, 65536, "/dev/null"), None),
    "no descriptor, and another file": (wire.welcome(SIZE, 65536, __file__), None),
    "a directory": (wire.welcome(SIZE, 65536, NONE), lambda: os.open("/tmp", os.O_RDONLY)),
    "a device": (wire.welcome(SIZE, 65536, NONE), lambda: os.open("/dev/zero", os.O_RDONLY)),
    "a descriptor that cannot be read": (wire.welcome(SIZE, 65536, NONE), lambda: os.open("/", os.O_PATH)),
    "an event": (wire.welcome(SIZE, 65536, NONE), lambda: os.eventfd(0)),
    "an empty file": (wire.welcome(SIZE, 65536, NONE), lambda: file_of(0)),
    "too small a file": (wire.welcome(SIZE, 65536, NONE), lambda: file_of(BASE // 2)),
    "a file that is one page too small": (wire.welcome(SIZE, 65536, NONE), lambda: file_of(SIZE - 4096)),
    "another file, which is too large": (wire.welcome(SIZE, 65536, NONE), lambda: file_of(SIZE + 4096)),
    "size 0": (wire.welcome(0, 65536, NONE), lambda: file_of(0)),
    "size 0, slots 0": (wire.welcome(0, 0, NONE), lambda: file_of(0)),
    "a size beyond all": (wire.welcome(HUGE, 65536, NONE), lambda: file_of(SIZE)),
    "a directory larger than the file": (wire.welcome(4096, 65536, NONE), lambda: file_of(4096)),
    "a directory beyond all": (wire.welcome(SIZE, (1 << 32) - 1, NONE), lambda: file_of(SIZE)),
}


def join_here_and_there(pipe: Connection, here: str, there: str) -> tuple[str, float, list[str]]:
    """Join an honest lane, then an impostor. Returns what the impostor got one to raise, and the descriptors."""
    with Reader("tp") as reader:
        reader.join(here)
        pipe.send("joined")
        ticket = pipe.recv()
        before = descriptors()
        problem = "joined"
        try:
            reader.join(there)
        except LaneError as error:
            problem = f"{type(error).__name__}: {error}"
        gc.collect()
        left = descriptors() - before
        assert reader.lanes() == (here,)
        return problem, float(reader.take(ticket).sum()), list(left)


@pytest.mark.parametrize("answer", WELCOMES.values(), ids=WELCOMES.keys())
def test_a_welcome_that_is_none_is_refused(lane: Lane, answer: Answer) -> None:
    """With JoinRefused: without SIGBUS, without a descriptor left, and other lanes are as before."""
    message, make = answer
    heard: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        assert receive(connection) == (wire.hello("tp"), [])
        with ExitStack() as scope:
            fds = [] if make is None else [make()]
            for fd in fds:
                scope.callback(os.close, fd)
            socket.send_fds(connection, [message], fds) if fds else connection.send(message)
            heard.extend(until_it_hangs_up(connection))

    with impostor(behave) as address, Child(join_here_and_there, lane.address, address) as child:
        assert child.hear() == "joined"
        child.say(put(lane, torch.ones(100)))
        problem, total, left = child.result()
    assert problem.startswith(f"JoinRefused: lane {address}"), problem
    assert (total, left) == (100.0, [])
    assert all(wire.kind(message) == wire.SORRY for message in heard), "it did not say MAPPED"


def refusal(address: str, timeout: float = DEADLINE) -> str:
    """Why a new reader cannot join, asked twice."""
    said = []
    with Reader("tp") as reader:
        for _ in range(2):
            try:
                reader.join(address, timeout)
            except JoinRefused as error:
                said.append(str(error))
            assert reader.lanes() == ()
    assert said[0] == said[1]
    return said[0]


def test_a_path_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def behave(connection: socket.socket) -> None:
        receive(connection)
        connection.send(wire.welcome(SIZE, 65536, str(tmp_path / "pipe")))
        until_it_hangs_up(connection)

    with impostor(behave, visitors=2) as address:
        assert "could not be mapped" in run(refusal, address)


@given(
    message=st.binary(max_size=300)
    | st.builds(bytes.__add__, st.just(bytes((wire.WELCOME,))), st.binary(max_size=80))
)
@settings(max_examples=100, deadline=None)
def test_random_answers_to_a_greeting(message: bytes) -> None:
    def behave(connection: socket.socket) -> None:
        receive(connection)
        connection.send(message)
        until_it_hangs_up(connection)

    before = descriptors()
    with impostor(behave, visitors=2) as address:
        assert refusal(address).startswith(f"lane {address}")
    wait_until(lambda: not descriptors() - before, "the end of the reader")


def test_a_producer_that_says_nothing_is_given_up() -> None:
    with impostor(until_it_hangs_up, visitors=2) as address:
        assert "no answer within 0.1 s" in refusal(address, timeout=0.1)


@contextmanager
def full_queue() -> Iterator[tuple[str, socket.socket, int]]:
    """An address, its listener, and how many wait there already; more do not get in."""
    address = f"mmlane-test-{secrets.token_hex(8)}"
    with listen(address) as listener, ExitStack() as scope:
        for waiting in range(100):
            connection = scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.setblocking(False)
            try:
                connection.connect(f"\0{address}")
            except BlockingIOError:
                yield address, listener, waiting
                return
        raise AssertionError("the queue is never full")


def test_a_producer_that_accepts_nobody_is_given_up() -> None:
    with full_queue() as (address, _, _):
        assert "no answer within 0.1 s" in refusal(address, timeout=0.1)


def test_a_reader_waits_in_a_full_queue() -> None:
    said: list[str] = []
    with full_queue() as (address, listener, crowd):
        reader = threading.Thread(target=lambda: said.append(refusal(address)), daemon=True)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive(), "it did not wait"
        for place in range(crowd + 2):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                if place >= crowd:
                    connection.send(wire.sorry("it is your turn"))
                    until_it_hangs_up(connection)
        reader.join(DEADLINE)
    assert ["it is your turn" in reason for reason in said] == [True]


@pytest.mark.parametrize("last", ["nothing", "its end", "a descriptor", "sorry", "noise"])
def test_a_producer_that_does_not_let_one_in(last: str) -> None:
    """The join is refused, and so is the next one: nothing of the first is left."""

    def behave(connection: socket.socket) -> None:
        receive(connection)
        fd = file_of(SIZE)
        socket.send_fds(connection, [wire.welcome(SIZE, 65536, NONE)], [fd])
        assert receive(connection)[0] == MAPPED
        if last == "nothing":
            until_it_hangs_up(connection)
        elif last == "a descriptor":
            socket.send_fds(connection, [bytes((wire.WARM,))], [fd])
        elif last != "its end":
            connection.send(wire.sorry("no more") if last == "sorry" else b"\xf3garbage")
        os.close(fd)

    before = descriptors()
    with impostor(behave, visitors=2) as address:
        reason = refusal(address, timeout=0.5 if last == "nothing" else DEADLINE)
        assert f"lane {address} could not be joined" in reason
    wait_until(lambda: not descriptors() - before, "the end of the reader")


# What a producer may say, and whether it makes sense.
WORDS_FOR_A_READER: dict[str, tuple[bytes, bool]] = {
    "random bytes": (b"\xf3\x00\x91garbage", False),
    "a longer message than there are": (wire.pairs(wire.WARM, [(0, 4096)] * 1000), False),
    "an empty message": (b"", False),
    "half a pair": (bytes((wire.WARM,)) + b"12345678", False),
    "memory beyond the end": (wire.pairs(wire.WARM, [(SIZE - 4096, 8192)]), False),
    "memory beyond all": (wire.pairs(wire.WARM, [(HUGE, HUGE)]), False),
    "more memory than there is": (wire.pairs(wire.WARM, [(0, HUGE)]), False),
    "memory far away": (wire.pairs(wire.WARM, [(1 << 63, 4096)]), False),
    "memory between pages": (wire.pairs(wire.WARM, [(BASE + 7, 100)]), True),
    "no memory": (wire.pairs(wire.WARM, [(BASE, 0)]), True),
    "cold memory beyond all": (wire.pairs(wire.COLD, [(HUGE, HUGE)]), True),
    "tickets beyond all revoked": (wire.pairs(wire.REVOKE, [(HUGE, HUGE), (0, 0)]), True),
    **{
        name: (wire.pairs(kind, [(1, 1)]), False)
        for name, kind in KINDS.items()
        if kind not in (wire.WARM, wire.COLD, wire.REVOKE)
    },
}


@pytest.mark.parametrize(("word", "makes_sense"), WORDS_FOR_A_READER.values(), ids=WORDS_FOR_A_READER.keys())
def test_a_producer_that_talks_nonsense_is_heard_on(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes, makes_sense: bool
) -> None:
    """To hang up would tell it that what is held here is free. Nothing else happens, to this lane or to others."""
    heard = threading.Event()
    fd = file_of(SIZE)

    def behave(connection: socket.socket) -> None:
        receive(connection)
        socket.send_fds(connection, [wire.welcome(SIZE, 65536, NONE)], [fd])
        assert receive(connection)[0] == MAPPED
        connection.send(wire.pairs(wire.JOINED, [(0, 0)]))
        socket.send_fds(connection, [word], [fd] * 100)
        connection.send(wire.pairs(wire.REVOKE, [(7, 7)]))
        while (answer := receive(connection)[0]) != wire.pairs(wire.FORGONE, [(7, 7)]):
            assert answer, "it hung up"
        heard.set()
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        reader.join(lane.address)
        before = descriptors()
        with impostor(behave) as address:
            reader.join(address)
            assert heard.wait(DEADLINE)
            assert set(reader.lanes()) == {lane.address, address}
            ignored = ["made no sense, which is ignored" in record.message for record in caplog.records]
            assert ignored == ([] if makes_sense else [True])
            assert os.fstat(fd).st_blocks * 512 <= BASE + 8192, "it committed the producer's memory"
            serves(lane, reader)
            reader.close()
    os.close(fd)
    wait_until(lambda: not descriptors() - before, "the end of the reader")


def test_more_descriptors_than_one_are_closed() -> None:
    fd = file_of(SIZE)

    def behave(connection: socket.socket) -> None:
        receive(connection)
        socket.send_fds(connection, [wire.welcome(SIZE, 65536, NONE)], [fd] * 100)
        receive(connection)
        connection.send(wire.pairs(wire.JOINED, [(0, 0)]))
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        before = descriptors()
        with impostor(behave) as address:
            reader.join(address)
            # a listener, both ends of a connection, the memory
            assert (descriptors() - before).total() == 4
            reader.close()
    os.close(fd)


# --- an address that is used again -------------------------------------------------------------------------


@contextmanager
def lane_at(monkeypatch: pytest.MonkeyPatch, number: str) -> Iterator[Lane]:
    """A lane at a chosen address."""
    with monkeypatch.context() as patch:
        patch.setattr("mmlane.lane.producer.secrets.token_hex", lambda nbytes: number)
        lane = Lane({"tp": 1}, capacity=8 * MIB)
    with lane:
        yield lane


def test_a_new_lane_at_an_old_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old tickets are stale, also for who knows the new lane only; who knew the old one can join the new (5)."""
    number = secrets.token_hex(8)
    with Reader("tp") as old, Reader("tp") as new:
        with lane_at(monkeypatch, number) as first:
            address = first.address
            old.join(address)
            held = old.take(put(first, tensor := new_tensor()))
            late, later = put(first, new_tensor()), put(first, new_tensor())
        wait_until(lambda: old.lanes() == (), "the end of the first lane")
        old.discard(late)  # for a while, what was on its way can still be taken
        with lane_at(monkeypatch, number) as second:
            assert second.address == address
            new.join(address)
            old.join(address)
            assert old.lanes() == (address,)
            for ticket in (put(second, new_tensor()), put(second, new_tensor())):
                for reader in (old, new):
                    with pytest.raises(StaleTicket):
                        reader.take(later)
                    reader.discard(ticket)
            assert torch.equal(held, tensor)
            del held  # says nothing to the second lane
            serves(second, old, new)
            stats = second.stats()
            assert (stats.strays, stats.strangers, stats.readers) == (0, 0, {"tp": 2})


# --- no descriptors left -----------------------------------------------------------------------------------


class Counter(logging.Handler):
    """Counts what the lane says."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word
        self.count = 0
        logging.getLogger("mmlane.lane").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += self.word in record.getMessage()


def produce_without_descriptors(pipe: Connection) -> tuple[int, float]:
    """A lane that cannot let readers in for two seconds; meanwhile it serves the one that it has."""
    warnings = Counter("raise `ulimit -n`")
    with Lane({"tp": 1}, capacity=32 * MIB) as lane:
        pipe.send(lane.address)
        assert lane.wait_open(DEADLINE)
        pipe.send(put(lane, torch.ones(10)))
        pipe.recv()
        before = limit_descriptors(0)
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        began = time.monotonic()
        pipe.send("exhausted")
        wait_until(lambda: warnings.count >= 2, "another attempt")
        pipe.send(put(lane, torch.ones(8 * MIB)))  # commits memory, too
        pipe.recv()
        seen, took = warnings.count, time.monotonic() - began
        limit(7, before)  # RLIMIT_NOFILE
        wait_until(lambda: lane.stats().readers == {"tp": 3}, "the readers that waited")
        pipe.send(put(lane, torch.ones(10)))
        pipe.recv()
        assert lane.stats().tickets == 0
        return seen, took


def test_readers_wait_while_the_producer_has_no_descriptors_left() -> None:
    with Child(produce_without_descriptors) as child, ExitStack() as scope:
        address = child.hear()
        first, *others = [scope.enter_context(Reader("tp")) for _ in range(3)]
        first.join(address)
        assert first.take(child.hear()).sum() == 10
        child.say()
        assert child.hear() == "exhausted"
        with ExitStack() as waiting:
            for reader in others:
                waiting.enter_context(in_a_thread(lambda reader=reader: reader.join(address, timeout=DEADLINE)))  # type: ignore[misc]
            assert first.take(child.hear()).sum() == 8 * MIB
            child.say()
        ticket = child.hear()
        for reader in (first, *others):
            assert reader.take(ticket).sum() == 10
        child.say()
        seen, took = child.result()
        assert 2 <= seen <= took + 2, "it tries once a second and sleeps in between"
