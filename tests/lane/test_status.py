"""Asking a lane how it does: the truth, in any state, and whoever asks and however, the lane serves on."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import mmlane.lane
from mmlane.lane import Lane, Reader, Refused, StatusError, wire
from mmlane.lane.status import LaneStats, ask, running
from tests.lane.harness.child import Child
from tests.lane.harness.confinement import NOBODY, become, require_other_users
from tests.lane.harness.kernel import open_files
from tests.lane.harness.libc import checked
from tests.lane.harness.peers import Company, Producing, Reading
from tests.lane.harness.sockets import address_of_nobody, impostor, receive, visit
from tests.lane.harness.together import serves
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

MIB = 1 << 20
_CLONE_NEWNET = 0x40000000
STATUS = bytes((protocol.STATUS,))
COMMAND = (sys.executable, "-c", "from mmlane.cli import main; main()", "status")


def command(*words: str) -> str:
    """What `mmlane status` says."""
    environ = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([*COMMAND, *words], env=environ, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- what a lane tells -------------------------------------------------------------------------------------


def test_a_lane_tells_what_its_producer_knows_in_every_state(company: Company) -> None:
    """Waiting for a reader, open, with tickets out, given back but not drained yet, after its reader's death."""
    producer = company.producer({"tp": 2}, capacity=8 * MIB)
    address = company.invitation(producer)

    def told() -> LaneStats:
        stats = ask(address)
        known = producer.call(Producing.stats)
        assert replace(stats, warm=known.warm) == known  # memory may be committed ahead of need meanwhile
        assert (stats.address, stats.pid, stats.rejected_peers) == (address, producer.pid, 0)
        return stats

    assert address in running()
    first = company.reader("tp", address)
    assert isinstance(producer.call(Producing.try_put, 1, 1000), Refused)
    stats = told()
    assert (stats.is_open, stats.expected, stats.readers) == (False, {"tp": 2}, {"tp": 1})
    assert (stats.fallbacks, stats.copied_bytes, stats.copy_seconds) == ({"not_open": 1}, 0, 0.0)

    second = company.reader("tp", address)
    assert told().is_open
    sent = producer.call(Producing.put, 1, MIB, uses=3)
    again = producer.call(Producing.put, 1, MIB)
    stats = told()
    assert (stats.tickets, stats.extents, stats.puts, stats.shared) == (2, 1, 2, 1)
    assert (stats.used_bytes, stats.copied_bytes) == (MIB, MIB) and stats.copy_seconds > 0
    assert stats.committed_bytes >= MIB and stats.capacity_bytes == 8 * MIB

    for reader in (first, second):
        for ticket in (sent, again):
            reader.call(Reading.discard, ticket)
    stats = ask(address)  # nobody else has drained the lane
    assert (stats.tickets, stats.used_bytes, stats.extents) == (0, MIB, 1)  # a use is left
    producer.call(Producing.forget, 1)
    stats = ask(address)
    assert (stats.used_bytes, stats.extents) == (0, 0)
    second.kill()
    eventually(lambda: ask(address).readers == {"tp": 1}, "the reader's end")
    assert not told().is_open
    assert first.call(Reading.lanes) == (address,)


def test_what_was_not_copied_does_not_count(lane: Lane) -> None:
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        assert isinstance(lane.put(torch.zeros(64 * MIB, dtype=torch.uint8)), Refused)
        assert lane.stats().copied_bytes == 0
        assert isinstance(lane.put(torch.zeros(1000, dtype=torch.uint8)), bytes)
        assert lane.stats().copied_bytes == 1000


def test_a_lane_that_has_ended_is_not_listed(company: Company) -> None:
    producer = company.producer({"tp": 1})
    address = company.invitation(producer)
    assert address in running()
    producer.kill()
    assert address not in running()
    with pytest.raises(StatusError, match=f"lane {address} does not tell its status: nobody listens there"):
        ask(address)


def test_a_producer_that_stands_still_is_not_waited_for(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    address = company.invitation(producer)
    producer.stop()
    with pytest.raises(StatusError, match=r"no answer within 0\.1 s"):
        ask(address, timeout=0.1)
    producer.go_on()
    stats = ask(address)
    assert stats.is_open and stats.readers == {"tp": 1}
    reader.call(Reading.take, producer.call(Producing.put, 1, 1000))
    reader.call(Reading.let_go)


# --- whoever asks, and however -----------------------------------------------------------------------------


def test_a_thousand_questions_amid_joins(lane: Lane) -> None:
    """None of them becomes a reader or keeps one out, and each gets its answer."""
    before = open_files()

    def asks() -> None:
        for _ in range(125):
            assert ask(lane.address, DEADLINE).expected == {"tp": 1}

    with Reader("tp") as first:
        first.join(lane.invitation)
        with ExitStack() as crowd:
            for _ in range(8):
                crowd.enter_context(in_a_thread(asks))
            for number in range(20):
                with Reader("tp") as reader:
                    reader.join(lane.invitation, DEADLINE)
                    ticket = lane.put(torch.full((100,), number))
                    assert isinstance(ticket, bytes), ticket
                    assert first.take(ticket, "clone").tolist() == [number] * 100
                    assert reader.take(ticket, "clone").tolist() == [number] * 100
        eventually(lambda: lane.stats().readers == {"tp": 1}, "the end of the other readers")
    del first, reader
    stats = lane.stats()
    assert (stats.rejected_peers, stats.malformed_messages, stats.tickets, stats.puts) == (0, 0, 0, 20)
    eventually(lambda: not open_files() - before, "the end of all connections")


def test_questions_do_not_open_a_lane(lane: Lane) -> None:
    for _ in range(3):
        assert (ask(lane.address).is_open, lane.is_open) == (False, False)
    assert lane.stats().readers == {} and lane.stats().rejected_peers == 0
    serves(lane)


def test_a_visitor_that_says_nothing_holds_up_no_answer(lane: Lane) -> None:
    with visit(lane.address), visit(lane.address) as other:
        assert ask(lane.address).rejected_peers == 0
        other.close()
        eventually(lambda: ask(lane.address).rejected_peers == 1, "its end")
        serves(lane)


def test_who_asks_over_and_over_without_listening_is_answered_once(lane: Lane) -> None:
    with visit(lane.address) as connection:
        with pytest.raises(ConnectionError):
            while True:
                connection.send(STATUS)
        answers = [receive(connection) for _ in range(3)]  # a reset, for questions left unread, may come first
        assert [(protocol.kind(answer), fds) for answer, fds in answers if answer] == [(protocol.STATUS, [])]
    serves(lane)
    assert lane.stats().malformed_messages == 0


def test_who_asks_and_hangs_up_does_no_harm(lane: Lane) -> None:
    before = open_files()
    for _ in range(200):
        with visit(lane.address) as connection:
            connection.send(STATUS)
    serves(lane)
    eventually(lambda: not open_files() - before, "the end of all connections")


def test_a_question_after_a_greeting_is_not_expected(lane: Lane) -> None:
    with visit(lane.address) as connection:
        connection.send(protocol.hello("tp"))
        os.close(*receive(connection)[1])
        connection.send(STATUS)
        assert "message 12 was not expected" in protocol.read_reject(receive(connection)[0])
    assert lane.stats().readers == {}


def test_a_reader_that_asks_is_not_cut_off(lane: Lane) -> None:
    with visit(lane.address) as connection:
        connection.send(protocol.hello("tp"))
        os.close(*receive(connection)[1])
        connection.send(bytes((protocol.MAPPED,)))
        assert protocol.kind(receive(connection)[0]) == protocol.JOINED
        connection.send(STATUS)
        stats = ask(lane.address)
        assert (stats.malformed_messages, stats.readers) == (1, {"tp": 1})


def ask_as_nobody(pipe: Connection, address: str) -> tuple[str, tuple[bytes, list[int]], bool]:
    """What is said to another user: to who asks by the rules, and to who asks all the same."""
    become(NOBODY)
    with pytest.raises(StatusError) as refusal:
        ask(address)
    with visit(address) as connection:
        with suppress(BrokenPipeError):  # sent away before it could say a word
            connection.send(STATUS)
        return str(refusal.value), receive(connection), address in running()


def test_another_user_is_told_nothing(lane: Lane) -> None:
    require_other_users()
    with Child(ask_as_nobody, lane.address) as child:
        reason, answer, listed = child.result()
    assert f"it belongs to user {os.geteuid()}, this is user {NOBODY}" in reason
    assert answer == (b"", []) and listed
    assert lane.stats().rejected_peers == 2
    serves(lane)


def test_a_status_too_long_for_a_message_is_refused() -> None:
    with Lane({f"{number:0100}": 1 for number in range(1000)}, capacity=4 * MIB) as lane:
        with pytest.raises(StatusError, match=r"a status of \d+ bytes, of which a message holds 65536"):
            ask(lane.address)
        assert lane.stats().rejected_peers == 1


# --- what answers ------------------------------------------------------------------------------------------


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The address of something that is no lane of this version, and answers one question so."""

    def answer(connection: socket.socket) -> None:
        assert receive(connection) == (STATUS, [])
        for word in answers:
            connection.send(word)

    with impostor(answer) as address:
        yield address


ANSWERS: dict[str, tuple[tuple[bytes, ...], str]] = {
    "an older lane": (
        (protocol.reject("message 12 was not expected"),),
        "not expected .if it is of an older mmlane",
    ),
    "an end": ((), "it hung up"),
    "another message": ((protocol.pairs(protocol.WARM, [(0, 0)]),), "message 7 instead of a status"),
    "no JSON": ((STATUS + b"\xff{",), "damaged status"),
    "no object": ((STATUS + b"[1]",), "damaged status"),
    "a deep list": ((STATUS + b"[" * 60_000,), "damaged status"),
    "a cut object": ((STATUS + b'{"address": "mm',), "damaged status"),
    "another version": ((protocol.status({"address": "x", "colour": "red"}),), "another version of mmlane"),
}


@pytest.mark.parametrize(("words", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_makes_no_sense_is_one_clear_error(words: tuple[bytes, ...], reason: str) -> None:
    before = open_files()
    with answering(*words) as address, pytest.raises(StatusError, match=reason) as caught:
        ask(address, DEADLINE)
    assert str(caught.value).startswith(f"lane {address} does not tell its status: ")
    assert "\n" not in str(caught.value)
    assert not open_files() - before


def test_a_queue_that_does_not_move_is_not_waited_for() -> None:
    address = address_of_nobody()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen(0)
        with visit(address), pytest.raises(StatusError, match=r"no answer within 0\.1 s"):
            ask(address, timeout=0.1)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_shows_all_lanes_and_why_one_does_not_answer(company: Company) -> None:
    opened, _ = company.open(["tp", "tp", "vit"], capacity=8 * MIB)
    waiting = company.producer({"tp": 2})
    mute = company.producer({"tp": 1})
    addresses = [company.invitation(producer) for producer in (opened, waiting, mute)]
    opened.call(Producing.put, 1, MIB)
    waiting.call(Producing.try_put, 1, 1000)
    mute.stop()

    found = {lane["address"]: lane for lane in json.loads(command("--json"))}
    first, second, third = (found[address] for address in addresses)
    stats = first["stats"]
    assert (first["pid"], first["problem"], stats["address"]) == (opened.pid, None, addresses[0])
    cmdline = Path(f"/proc/{opened.pid}/cmdline").read_text().replace("\0", " ").split()
    assert first["command"].split() == cmdline
    assert (stats["is_open"], stats["tickets"], stats["copied"]) == (True, 1, MIB)
    assert stats["readers"] == stats["expected"] == {"tp": 2, "vit": 1}
    assert (second["stats"]["is_open"], second["stats"]["refused"]) == (False, {"not_open": 1})
    assert (third["pid"], third["stats"], third["command"]) == (mute.pid, None, None)
    assert "no answer within 2 s" in third["problem"]

    said = command()
    first, second, third = (said[said.index(address) :].split("\n\n")[0] for address in addresses)  # blank lines
    for text in ("open", "'tp' 2/2, 'vit' 1/1", "1 MiB in use by 1 extent", "1 out", "1 MiB copied"):
        assert text in first, text
    for text in ("waiting for readers: 2 in 'tp'", "'tp' 0/2", "1 not_open"):
        assert text in second, text
    assert "does not tell its status" in third.replace("\n", " ")
    mute.go_on()


def alone(pipe: Connection, words: tuple[str, ...]) -> str:
    """What the command says in a network of its own, where no lane is."""
    checked(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET))
    return command(*words)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_no_lane_is_no_error(lane: Lane, words: tuple[str, ...]) -> None:
    require_other_users()  # as root, one can have a network of one's own, too
    with Child(alone, words) as child:
        said = child.result()
    if words:
        assert json.loads(said) == []
    else:
        said = " ".join(said.split())
        assert said.startswith("No lane runs") and "mode arena" in said and "image" in said
        assert "in its log at start, in a line with 'no lane'" in said


def test_watching_goes_on_until_ctrl_c(company: Company) -> None:
    producer, _ = company.open(["tp"], capacity=8 * MIB)
    ours, theirs = pty.openpty()
    environ = {**os.environ, "COLUMNS": "100", "LINES": "200", "TERM": "xterm"}
    screen = ""
    words = [*COMMAND, "--watch"]
    with subprocess.Popen(
        words,
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    ) as watching:
        os.close(theirs)

        def shows(pattern: str) -> None:
            nonlocal screen
            while not re.search(pattern, screen, re.DOTALL):
                assert select.select([ours], [], [], DEADLINE)[0], screen
                screen += os.read(ours, 1 << 16).decode(errors="replace")

        of_this_lane = rf"{company.invitation(producer)}((?!mmlane-\d).)*"  # not of one that somebody else has
        try:
            shows(rf"{of_this_lane}\b0 out")
            producer.call(Producing.put, 1, MIB)
            shows(rf"{of_this_lane}\b1 out")
            watching.send_signal(signal.SIGINT)
            with suppress(OSError):  # EIO: its end
                shows("Traceback")
            assert "Traceback" not in screen
            assert watching.wait(DEADLINE) == 0
        finally:
            watching.kill()
            os.close(ours)


def test_the_command_needs_no_torch() -> None:
    code = "import sys, mmlane.cli, mmlane.lane; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_needs_torch_is_still_there() -> None:
    assert all(hasattr(mmlane.lane, name) for name in mmlane.lane.__all__)
    assert not hasattr(mmlane.lane, "Lain")
