"""Whoever connects to a lane without being a reader yet: who is not to have anything gets nothing."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
import struct
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection

import pytest

from mmlane.lane import JoinRefused, Lane, Reader, control, wire
from tests.lane.harness.child import Child, run
from tests.lane.harness.confinement import NOBODY, become, require_other_users
from tests.lane.harness.kernel import open_files
from tests.lane.harness.sockets import HUGE, KINDS, MAPPED, listen, receive, visit
from tests.lane.harness.together import serves
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20


# --- another user ------------------------------------------------------------------------------------------


def visit_as_nobody(pipe: Connection, address: str, producer: int) -> tuple[bytes, int, list[str]]:
    """Connect and say all the right things. Returns the answer, and what descriptors came of it."""
    become(NOBODY)
    with visit(address) as connection:
        with suppress(BrokenPipeError):  # sent away before it could say a word
            connection.send(protocol.hello("tp"))
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
    assert lane.stats().rejected_peers == 1
    with Reader("tp") as reader:
        reader.join(lane.invitation)
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
        reader.join(lane.invitation)
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
    "a long greeting": [protocol.hello("tp" * 50_000)],
    "a greeting cut short": [bytes((protocol.HELLO,))],
    "another version": [bytes((protocol.HELLO,)) + struct.pack("<H", protocol.VERSION + 1) + b"tp"],
    "an unknown group": [protocol.hello("pp")],
    "an empty group": [protocol.hello("")],
    "a group that is no text": [protocol.hello("") + b"\xff\xfe"],
    "a group with a newline": [protocol.hello("tp\nlane x serves on")],
    "nothing": [],
    **{f"{name} first": [bytes((kind,))] for name, kind in KINDS.items()},
    **{f"{name} with pairs first": [protocol.pairs(kind, [(0, 0), (HUGE, HUGE)])] for name, kind in KINDS.items()},
}


@pytest.mark.parametrize("words", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_visitor_that_talks_nonsense_gets_nothing(lane: Lane, words: list[bytes]) -> None:
    before = open_files()
    with visit(lane.address) as connection:
        for word in words:
            connection.send(word)
        if not words:
            connection.shutdown(socket.SHUT_WR)
        answer, fds = receive(connection)
        assert not fds and (not answer or protocol.kind(answer) == protocol.REJECT)
        assert receive(connection) == (b"", [])  # hung up
    eventually(lambda: lane.stats().rejected_peers == 1, "a stranger")
    assert not open_files() - before
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)
    assert lane.stats().malformed_messages == 0


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (bytes((protocol.HELLO,)) + struct.pack("<H", protocol.VERSION + 7) + b"tp", "run one version of mmlane"),
        (protocol.hello("pp"), "unknown group 'pp', expected 'tp'"),
    ],
)
def test_a_visitor_that_is_mistaken_is_told_why(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes, reason: str
) -> None:
    with caplog.at_level(logging.INFO, "mmlane.lane"), visit(lane.address) as connection:
        connection.send(word)
        answer, _ = receive(connection)
        assert reason in protocol.read_reject(answer)
        assert receive(connection) == (b"", [])
    assert [reason in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "word",
    [
        protocol.hello("tp"),
        *(bytes((kind,)) for kind in (0, 255, *KINDS.values()) if kind != protocol.MAPPED),
    ],
)
def test_a_greeting_is_followed_by_mapped_or_the_end(lane: Lane, word: bytes) -> None:
    with visit(lane.address) as connection:
        connection.send(protocol.hello("tp"))
        _, fds = receive(connection)
        os.close(*fds)
        connection.send(word)
        answer, fds = receive(connection)
        assert not fds and protocol.kind(answer) == protocol.REJECT
        assert receive(connection) == (b"", [])
    stats = lane.stats()
    assert (stats.rejected_peers, stats.readers, stats.is_open) == (1, {}, False)


def test_a_group_can_have_an_empty_name() -> None:
    with Lane({"": 1}, capacity=4 * MIB) as lane, Reader("") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)


def test_a_crowd_that_says_nothing_keeps_others_out_only_while_it_is_there(lane: Lane) -> None:
    """Its places are free again when it leaves; who came in vain is told what may be the matter."""
    before = open_files()
    crowd = [visit(lane.address) for _ in range(control._PENDING + 20)]
    eventually(lambda: lane.stats().rejected_peers == 20, "20 strangers")
    with Reader("tp") as reader:
        with pytest.raises(JoinRefused, match="too many wait"):
            reader.join(lane.invitation)
        assert lane.stats().rejected_peers == 21
        for connection in crowd:
            connection.close()
        eventually(lambda: lane.stats().rejected_peers == len(crowd) + 1, "the end of the crowd")
        reader.join(lane.invitation)
        serves(lane, reader)
    del reader
    eventually(lambda: not open_files() - before, "the end of all connections")


def test_a_crowd_that_says_nothing_is_sent_away(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PATIENCE", 0.1)
    crowd = [visit(lane.address) for _ in range(control._PENDING)]
    for connection in crowd:
        answer, fds = receive(connection)
        assert not fds and protocol.read_reject(answer) == "nothing heard for 0.1 s"
        connection.close()
    assert lane.stats().rejected_peers == len(crowd)
    monkeypatch.undo()
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)


def test_a_greeting_alone_does_not_keep_a_place(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the memory and never says MAPPED is sent away too."""
    monkeypatch.setattr(control, "_PATIENCE", 1800.0)
    with visit(lane.address) as connection:
        connection.send(protocol.hello("tp"))
        os.close(*receive(connection)[1])
        (guest,) = lane._control._guests.values()
        guest.deadline = 0.0  # its time is over
        lane._control._ring()
        assert protocol.kind(receive(connection)[0]) == protocol.REJECT
    assert lane.stats().readers == {}


def test_descriptors_that_nobody_asked_for_go_nowhere(lane: Lane) -> None:
    with Reader("tp") as reader, tempfile.TemporaryFile() as file:
        reader.join(lane.invitation)
        before = open_files()
        many = [file.fileno()] * 200
        with visit(lane.address) as connection:
            socket.send_fds(connection, [protocol.hello("pp")], many)
            assert receive(connection)[1] == []
        with visit(lane.address) as connection:
            socket.send_fds(connection, [protocol.hello("tp")], many)
            os.close(*receive(connection)[1])
            socket.send_fds(connection, [MAPPED], many)
            assert protocol.kind(receive(connection)[0]) == protocol.JOINED
            for kind in KINDS.values():
                socket.send_fds(connection, [protocol.pairs(kind, [(1, 1)])], many)
            socket.send_fds(connection, [b""], many)
            assert lane.stats().readers == {"tp": 2}
            assert (open_files() - before).total() == 2, "one end each"
        eventually(lambda: lane.stats().readers == {"tp": 1}, "its end")
        assert not open_files() - before
        serves(lane, reader)


def test_a_visitor_gets_memory_that_it_can_only_read(lane: Lane) -> None:
    """Written by the producer only, and never cut short under another reader (6)."""
    with visit(lane.address) as connection:
        connection.send(protocol.hello("tp"))
        welcome, (fd,) = receive(connection)
        size = protocol.read_welcome(welcome)[1]
        assert os.fstat(fd).st_size == size
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        for cut in (fd, lane._backing.fd):
            with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
                os.ftruncate(cut, size // 2)
        os.close(fd)
