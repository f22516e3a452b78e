"""Processes that connect to a lane and are no readers of it: they get nothing, and cost little."""

from __future__ import annotations

import logging
import mmap
import os
import select
import socket
import struct
import tempfile
import time
from multiprocessing.connection import Connection

import pytest

from mmlane.lane import Invitation, JoinRefused, Lane, Reader, admission, protocol
from mmlane.lane.status import StatusError, ask
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.child import Child, run
from tests.lane.harness.confinement import OTHER_UID, become, require_other_users
from tests.lane.harness.kernel import open_files
from tests.lane.harness.lane_with_readers import serves
from tests.lane.harness.sockets import (
    HUGE,
    KINDS,
    MAPPED,
    admitted,
    hello,
    impostor,
    invitation_without_lane,
    listen,
    receive,
    visit,
    welcomed,
)
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

MIB = 1 << 20


# --- another user ------------------------------------------------------------------------------------------


def look_into(pipe: Connection, producer: int) -> list[str]:
    """As another user: which of a producer's descriptors can be opened."""
    become(OTHER_UID)
    found = []
    for number in range(256):
        try:
            os.close(os.open(f"/proc/{producer}/fd/{number}", os.O_RDONLY))
        except OSError:
            continue
        found.append(f"/proc/{producer}/fd/{number}")
    return found


def test_another_user_finds_no_descriptor(lane: Lane) -> None:
    require_other_users()
    with Child(look_into, os.getpid()) as child:
        assert child.result() == []
    serves(lane)


def listen_as_another_user(pipe: Connection, name: str) -> bytes:
    """Wait where a lane would be. Returns what the reader says."""
    become(OTHER_UID)
    with listen(name) as listener:
        pipe.send("listening")
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE)
            return receive(connection)[0]


def test_a_reader_tells_nothing_to_another_user() -> None:
    require_other_users()
    invitation = invitation_without_lane()
    with Child(listen_as_another_user, invitation.name) as child, Reader("tp") as reader:
        assert child.hear() == "listening"
        with pytest.raises(JoinRefused, match=f"belongs to user {OTHER_UID}, this is user 0"):
            reader.join(invitation)
        assert child.result() == b""
        assert reader.lanes() == ()


def travel(uid: int) -> bool:
    become(uid)
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)
    return True


@pytest.mark.parametrize("uid", [OTHER_UID, 3_000_000_000])
def test_user_numbers_use_all_32_bits(uid: int) -> None:
    """And the overflow user has lanes, too."""
    require_other_users()
    assert run(travel, uid)


# --- what is no HELLO --------------------------------------------------------------------------------------

GARBAGE: dict[str, list[bytes]] = {
    "an empty message": [b""],
    "random bytes": [b"\xf3\x00\x91garbage"],
    "a long message": [b"\x01" + b"x" * 100_000],
    "a long HELLO": [protocol.hello(bytes(32), "tp" * 50_000, 0, "n")],
    "a HELLO cut short": [bytes((protocol.HELLO,))],
    "a HELLO without a body": [b"\x01\x03\x00"],
    "a HELLO of a deep list": [b"\x01\x03\x00" + b"[" * 4000],
    "another version": [bytes((protocol.HELLO,)) + struct.pack("<H", protocol.VERSION + 1) + b"tp"],
    "nothing": [],
    **{f"{name} first": [bytes((kind,))] for name, kind in KINDS.items() if name not in ("STATUS", "OFF", "ON")},
    **{
        f"{name} with pairs first": [protocol.pairs(kind, [(0, 0), (HUGE, HUGE)])]
        for name, kind in KINDS.items()
        if name not in ("STATUS", "OFF", "ON")
    },
}


@pytest.mark.parametrize("words", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_process_that_talks_nonsense_gets_nothing(lane: Lane, words: list[bytes]) -> None:
    before = open_files()
    with visit(lane.name) as connection:
        for word in words:
            connection.send(word)
        if not words:
            connection.shutdown(socket.SHUT_WR)
        answer, fds = receive(connection)
        assert not fds and protocol.kind(answer) == protocol.REJECT
        assert receive(connection) == (b"", [])  # it hangs up
    assert lane.stats().rejected_peers == 1
    assert not open_files() - before
    serves(lane)
    assert lane.stats().malformed_messages == 0


def with_secret(invitation: Invitation, group: str, number: int) -> bytes:
    return hello(invitation, group, number)


@pytest.mark.parametrize(
    ("group", "number", "reason"),
    [
        ("pp", 0, "reader 0 of 'pp' is not expected here; these are: reader 0 of 'tp'"),
        ("", 0, "reader 0 of '' is not expected here"),
        ("tp", 1, "reader 1 of 'tp' is not expected here"),
        ("tp", -1, "reader -1 of 'tp' is not expected here"),
        ("tp\nlane x is open", 0, r"reader 0 of 'tp\nlane x is open' is not expected here"),
        ("\ud800", 0, r"reader 0 of '\ud800' is not expected here"),
        ("tp" * 2000, 0, "bytes that are not JSON"),  # cut to what a message holds
    ],
)
def test_a_reader_that_is_mistaken_is_told_why(
    lane: Lane, caplog: pytest.LogCaptureFixture, group: str, number: int, reason: str
) -> None:
    """In one line, also in the log."""
    with caplog.at_level(logging.INFO, "mmlane.lane"), visit(lane.name) as connection:
        connection.send(hello(lane.invitation, group, number))
        answer, _ = receive(connection)
        assert reason in protocol.read_reject(answer)
        assert receive(connection) == (b"", [])
    (record,) = caplog.records
    assert reason in record.message and lane.name in record.message
    assert "\n" not in record.message


def test_readers_of_another_version_are_told_so(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmlane.lane"), visit(lane.name) as connection:
        connection.send(b"\x01\x02\x00tp")
        reason = protocol.read_reject(receive(connection)[0])
    assert reason == "protocol 2, this lane speaks 3: run one version of mmlane"
    assert [reason in record.message for record in caplog.records] == [True]


def test_what_an_unproven_process_says_is_not_written_to_the_log(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a reader has its reasons, and is quoted."""
    text = "ERROR: something that is not true\nand more"
    with caplog.at_level(logging.DEBUG):
        with visit(lane.name) as connection:
            connection.send(protocol.reject(text))
            assert "message 3 was not expected" in protocol.read_reject(receive(connection)[0])
        with visit(lane.name) as connection:
            connection.send(hello(Invitation.make(lane.name), text))
            receive(connection)
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert record.levelno <= logging.INFO and "not true" not in record.message


def test_a_reader_that_cannot_map_the_memory_is_quoted(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    with welcomed(lane.invitation) as connection:
        connection.send(protocol.reject("no room here"))
        assert protocol.kind(receive(connection)[0]) == protocol.REJECT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "it could not join: no room here" in record.message
    serves(lane)


@pytest.mark.parametrize("kind", [0, 255, *(kind for kind in KINDS.values() if kind != protocol.MAPPED)])
def test_a_hello_is_followed_by_mapped_or_the_end(lane: Lane, kind: int) -> None:
    word = hello(lane.invitation) if kind == protocol.HELLO else bytes((kind,))
    with welcomed(lane.invitation) as connection:
        connection.send(word)
        answer, fds = receive(connection)
        assert not fds and protocol.kind(answer) == protocol.REJECT
        assert receive(connection) == (b"", [])
    stats = lane.stats()
    assert (stats.rejected_peers, stats.joined, stats.state) == (1, {"tp": []}, "waiting")
    serves(lane)


def test_a_group_can_have_an_empty_name() -> None:
    with Lane({"": 1}, capacity=4 * MIB) as lane, Reader("") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)


# --- the reason arrives ------------------------------------------------------------------------------------


def test_a_reader_that_is_rejected_before_it_has_said_a_word_is_told_why(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_PATIENCE", 0.05)
    gate = Gate("join.connected")

    def join() -> None:
        with (
            Reader("tp") as reader,
            pytest.raises(JoinRefused, match=r"it rejected this process: nothing heard for 0\.05 s"),
        ):
            reader.join(lane.invitation)

    with in_a_thread(join):
        gate.wait()
        eventually(lambda: lane.stats().rejected_peers == 1, "it is rejected")
        gate.open()


def test_a_reader_that_is_rejected_unheard_is_told_why() -> None:
    """The kernel reports what was left unread as a reset, before the reason."""

    def behave(connection: socket.socket, _: Invitation) -> None:
        assert select.select([connection], [], [], DEADLINE)[0]
        connection.send(protocol.reject("I do not listen"))

    with impostor(behave, visitors=2) as invitation:
        with Reader("tp") as reader, pytest.raises(JoinRefused, match="it rejected this process: I do not listen"):
            reader.join(invitation)
        with pytest.raises(StatusError, match="I do not listen"):
            ask(invitation.name, DEADLINE)


# --- crowds ------------------------------------------------------------------------------------------------


def test_many_silent_connections_delay_a_reader_and_do_not_keep_it_out(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a bound to how many are heard at a time, and to how long. The reader waits, and comes in."""
    monkeypatch.setattr(admission, "_PATIENCE", 0.5)
    before = open_files()
    crowd = [visit(lane.name) for _ in range(admission._UNPROVEN + 20)]
    with Reader("tp") as reader:
        reader.join(lane.invitation, DEADLINE)
        serves(lane, reader)
        eventually(lambda: lane.stats().rejected_peers == len(crowd), "all of the crowd are rejected")
        for connection in crowd:
            answer, fds = receive(connection)
            assert protocol.kind(answer) == protocol.REJECT and not fds
            assert receive(connection) == (b"", [])
            connection.close()
    del reader
    lane.close()
    eventually(lambda: not open_files() - before, "the end of all connections")


def test_no_more_than_so_many_are_heard_at_a_time(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait in the queue, for as long as they like; members and questions of theirs are no part of it."""
    monkeypatch.setattr(admission, "_PATIENCE", DEADLINE)
    crowd = [visit(lane.name) for _ in range(admission._UNPROVEN)]
    eventually(lambda: len(lane._control.admission._connections) == admission._UNPROVEN, "all are accepted")
    with Reader("tp") as reader:
        with pytest.raises(JoinRefused, match=r"no answer within 0\.1 s"):
            reader.join(lane.invitation, 0.1)
        with pytest.raises(StatusError, match=r"no answer within 0\.1 s"):
            ask(lane.name, 0.1)
        assert lane.stats().rejected_peers == 0
        assert len(lane._control.admission._connections) == admission._UNPROVEN
        with in_a_thread(lambda: reader.join(lane.invitation, DEADLINE)):
            crowd.pop().close()  # one place is enough
        serves(lane, reader)
        for connection in crowd:
            connection.close()
        eventually(lambda: len(lane._control.admission._connections) == 1, "the end of the crowd")


def test_a_process_that_says_nothing_is_rejected(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_PATIENCE", 0.1)
    with visit(lane.name) as connection:
        answer, fds = receive(connection)
        assert not fds and protocol.read_reject(answer) == "nothing heard for 0.1 s"
    monkeypatch.undo()
    assert lane.stats().rejected_peers == 1
    serves(lane)


def test_a_reader_that_has_proven_itself_has_time(lane: Lane) -> None:
    """It may map much memory on a busy machine, or stand still: it keeps its number until its end."""
    with welcomed(lane.invitation) as connection:
        for one in lane._control.admission._connections.values():
            one.deadline = 0.0
        lane._control.agenda.wake()
        with pytest.raises(JoinRefused, match="is here already"), Reader("tp") as reader:
            reader.join(lane.invitation)
        connection.send(MAPPED)
        assert lane.wait_open(DEADLINE)


@pytest.mark.parametrize("word", [b"\0", bytes((protocol.STATUS,))], ids=["rejected", "answered"])
def test_after_each_rejected_peer_the_lane_accepts_no_connection_for_a_moment(lane: Lane, word: bytes) -> None:
    """So that connections in masses cost the producer little."""
    began = time.monotonic()
    count = 20
    for _ in range(count):
        with visit(lane.name) as connection:
            connection.send(word)
            receive(connection)
    assert time.monotonic() - began >= (count - 1) * admission._REST
    serves(lane)


def test_members_are_served_while_no_connection_is_accepted(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_REST", 1800.0)
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        serves(lane, reader)
        with visit(lane.name) as connection:
            connection.send(b"\0")
            receive(connection)
        serves(lane, reader)
        reader.close()
        eventually(lambda: lane.is_closed, "the end of the reader")


# --- descriptors -------------------------------------------------------------------------------------------


def test_unexpected_descriptors_are_closed() -> None:
    with (
        Lane({"tp": 2}) as lane,
        Reader("tp", 1) as reader,
        tempfile.TemporaryFile() as file,
    ):
        reader.join(lane.invitation)
        before = open_files()
        many = [file.fileno()] * 200
        with visit(lane.name) as connection:
            socket.send_fds(connection, [hello(lane.invitation, "pp")], many)
            assert receive(connection)[1] == []
        with visit(lane.name) as connection:
            socket.send_fds(connection, [hello(lane.invitation)], many)
            (fd,) = receive(connection)[1]
            os.close(fd)
            socket.send_fds(connection, [MAPPED], many)
            assert lane.wait_open(DEADLINE)
            for kind in KINDS.values():
                socket.send_fds(connection, [protocol.pairs(kind, [(1, 1)])], many)
            socket.send_fds(connection, [b""], many)
            assert lane.stats().joined == {"tp": [0, 1]}
            assert (open_files() - before).total() == 2, "one end each"
        eventually(lambda: lane.is_closed, "its end")
        eventually(lambda: not open_files() - before, "the end of all connections")


def test_a_connection_that_a_forked_child_still_has_open_breaks_nothing() -> None:
    """As between the fork and the first thing that the child does."""
    with Lane({"tp": 2}) as lane:
        connection = admitted(lane)
        (number,) = lane._control.inbox._members
        in_the_child = os.dup(number)
        connection.send(protocol.pairs(protocol.RELEASE, [(0, 0)]))
        connection.close()
        eventually(lambda: not lane._control.admission._connections, "the lane hears of its end")
        lane.drain()
        os.close(in_the_child)
        with Reader("tp", 0) as first, Reader("tp", 1) as second:
            first.join(lane.invitation)
            second.join(lane.invitation)
            serves(lane, first, second)


def test_a_reader_gets_memory_that_it_can_only_read(lane: Lane) -> None:
    """Written by the producer only, and never cut short under another reader (6)."""
    with visit(lane.name) as connection:
        connection.send(hello(lane.invitation))
        welcome, (fd,) = receive(connection)
        size = protocol.read_welcome(welcome, lane.invitation.secret, "once").nbytes
        assert os.fstat(fd).st_size == size
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        assert lane._committer.memory is not None
        for cut in (fd, lane._committer.memory.backing.fd):
            with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
                os.ftruncate(cut, size // 2)
        os.close(fd)
