"""Asking a lane for its state, and switching it off and on: each process that asks gets a true answer."""

from __future__ import annotations

import ctypes
import gc
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
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import mmlane.lane
from mmlane.lane import Invitation, Lane, Reader, Refused, StatusError, protocol
from mmlane.lane.status import LaneStats, ask, running, switch
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.child import Child
from tests.lane.harness.confinement import OTHER_UID, become, require_other_users
from tests.lane.harness.kernel import open_files
from tests.lane.harness.lane_with_readers import new_tensor, put, serves
from tests.lane.harness.libc import checked
from tests.lane.harness.peers import Company, Producing, Reading, baseline, carries
from tests.lane.harness.sockets import admitted, impostor, invitation_without_lane, receive, visit, welcomed
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

MIB = 1 << 20
_CLONE_NEWNET = 0x40000000
STATUS = bytes((protocol.STATUS,))
COMMAND = (sys.executable, "-c", "from mmlane.cli import main; main()")


def command(*words: str) -> str:
    """What `mmlane` says to these words."""
    environ = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([*COMMAND, *words], env=environ, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- what a lane tells -------------------------------------------------------------------------------------


def test_a_lane_tells_what_its_producer_knows_in_every_state(company: Company) -> None:
    """Waiting for a reader, open, with tickets out, released but not drained yet, off."""
    producer = company.producer({"tp": 2}, capacity=8 * MIB)
    invitation = company.invitation(producer)
    name = invitation.name

    def told() -> LaneStats:
        stats = ask(name)
        known = producer.call(Producing.stats)
        # Memory may be committed ahead of need between the two.
        assert replace(stats, committed_bytes=known.committed_bytes) == known
        assert (stats.name, stats.pid, stats.rejected_peers) == (name, producer.pid, 0)
        return stats

    assert name in running()
    first = company.reader("tp", invitation)
    assert isinstance(producer.call(Producing.try_put, 1, 1000), Refused)
    eventually(lambda: ask(name).joined == {"tp": [0]}, "the first has joined")
    stats = told()
    assert (stats.state, stats.expected) == ("waiting", {"tp": 2})
    assert (stats.fallbacks, stats.copied_bytes, stats.copy_seconds) == ({"not_open": 1}, 0, 0.0)

    second = company.reader("tp", invitation)
    assert producer.call(Producing.wait_open)
    assert told().state == "open"
    sent = producer.call(Producing.put, 1, MIB, uses=3)
    again = producer.call(Producing.put, 1, MIB)
    stats = told()
    assert (stats.tickets, stats.extents, stats.puts, stats.shared) == (2, 1, 2, 1)
    assert (stats.used_bytes, stats.copied_bytes) == (MIB, MIB) and stats.copy_seconds > 0
    assert stats.committed_bytes >= MIB and stats.capacity_bytes == 8 * MIB

    for reader in (first, second):
        for ticket in (sent, again):
            reader.call(Reading.discard, ticket)
    eventually(lambda: ask(name).tickets == 0, "the tickets are released")  # no other call has drained the lane
    stats = ask(name)
    assert (stats.tickets, stats.used_bytes, stats.extents) == (0, MIB, 1)  # a copy is kept for one ticket more
    producer.call(Producing.forget, 1)
    stats = ask(name)
    assert (stats.used_bytes, stats.extents) == (0, 0)
    assert switch(name, True).state == "off"
    assert told().state == "off"
    assert switch(name, False).state == "open"
    second.kill()
    eventually(lambda: name not in running(), "the lane ends with its reader")
    assert producer.call(Producing.stats).state == "closed"


# --- off and on --------------------------------------------------------------------------------------------


def test_a_lane_that_is_off_refuses_puts_and_nothing_else() -> None:
    """What is out is taken and released, what is held stays; on again, it goes on with the same readers."""
    with Lane({"tp": 1}, capacity=32 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        tensor = new_tensor()
        on_its_way = put(lane, tensor)
        held = reader.take(put(lane, tensor))
        for _ in range(2):
            assert switch(lane.name, True).state == "off"
            refusal = lane.put(tensor)
            assert isinstance(refusal, Refused) and refusal.cause == "off"
            assert "`mmlane on`" in refusal.detail
        assert isinstance(room := lane.reserve((3,), torch.float32), Refused) and room.cause == "off"
        assert torch.equal(reader.take(on_its_way), tensor) and torch.equal(held, tensor)
        del held
        eventually(lambda: lane.stats().tickets == 0, "both are released")
        assert lane.stats().fallbacks == {"off": 3}
        for _ in range(2):
            assert switch(lane.name, False).state == "open"
        serves(lane, reader)


def test_a_lane_can_be_off_before_it_opens(lane: Lane) -> None:
    """It opens all the same, and refuses puts until it is on."""
    assert switch(lane.name, True).state == "off"
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        refusal = lane.put(torch.zeros(3))
        assert isinstance(refusal, Refused) and refusal.cause == "off"
        assert not lane.is_open
        assert switch(lane.name, False).state == "open"
        serves(lane, reader)


def test_a_put_amid_which_the_lane_is_switched_off_leaves_nothing(lane: Lane) -> None:
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        gate = Gate("put.copied")
        answers: list[bytes | Refused] = []
        with in_a_thread(lambda: answers.append(lane.put(new_tensor()))):
            gate.wait()
            switch(lane.name, True)
            gate.open()
        (refusal,) = answers
        assert isinstance(refusal, Refused) and refusal.cause == "off"
        stats = lane.stats()
        assert (stats.tickets, stats.used_bytes) == (0, 0)
        switch(lane.name, False)
        serves(lane, reader)


def test_switching_a_lane_that_has_ended_is_an_error() -> None:
    with Lane({"tp": 1}) as lane:
        name = lane.name
    for off in (True, False):
        with pytest.raises(StatusError, match="no process listens there"):
            switch(name, off)


# --- what is counted ---------------------------------------------------------------------------------------


def test_what_was_not_copied_does_not_count(lane: Lane) -> None:
    with Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        assert isinstance(lane.put(torch.zeros(64 * MIB, dtype=torch.uint8)), Refused)
        assert lane.stats().copied_bytes == 0
        assert isinstance(lane.put(torch.zeros(1000, dtype=torch.uint8)), bytes)
        assert lane.stats().copied_bytes == 1000


def test_a_lane_that_has_ended_is_not_listed(company: Company) -> None:
    producer = company.producer({"tp": 1})
    name = company.invitation(producer).name
    assert name in running()
    producer.kill()
    assert name not in running()
    with pytest.raises(StatusError, match=f"lane {name} does not tell its status: no process listens there"):
        ask(name)


def test_a_producer_that_stands_still_is_not_waited_for(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    name = company.invitation(producer).name
    producer.stop()
    with pytest.raises(StatusError, match=r"no answer within 0\.1 s"):
        ask(name, timeout=0.1)
    producer.go_on()
    stats = ask(name)
    assert stats.state == "open" and stats.joined == {"tp": [0]}
    reader.call(Reading.take, producer.call(Producing.put, 1, 1000))
    reader.call(Reading.let_go)


# --- who asks, and how ------------------------------------------------------------------------------------


def test_a_thousand_questions_amid_joins() -> None:
    """None of them becomes a reader or keeps one out, and each gets its answer."""
    before = open_files()
    join_amid_questions(readers=20, questions=1000)
    gc.collect()  # a lane and its control know each other
    eventually(lambda: not open_files() - before, "the end of all connections")


def join_amid_questions(readers: int, questions: int) -> None:
    with Lane({"tp": readers}, capacity=32 * MIB) as lane, ExitStack() as scope:

        def asks() -> None:
            for _ in range(questions // 8):
                assert ask(lane.name, DEADLINE).expected == {"tp": readers}

        with ExitStack() as crowd:
            for _ in range(8):
                crowd.enter_context(in_a_thread(asks))
            joined = [scope.enter_context(Reader("tp", number)) for number in range(readers)]
            for reader in joined:
                reader.join(lane.invitation, DEADLINE)
            assert lane.wait_open(DEADLINE)
            serves(lane, *joined)
        stats = lane.stats()
        assert (stats.rejected_peers, stats.malformed_messages, stats.tickets, stats.puts) == (0, 0, 0, 1)


def test_questions_do_not_open_a_lane(lane: Lane) -> None:
    for _ in range(3):
        assert (ask(lane.name).state, lane.state) == ("waiting", "waiting")
    assert lane.stats().joined == {"tp": []} and lane.stats().rejected_peers == 0
    serves(lane)


def test_a_process_that_says_nothing_holds_up_no_answer(lane: Lane) -> None:
    with visit(lane.name), visit(lane.name) as other:
        assert ask(lane.name).rejected_peers == 0
        other.close()
        eventually(lambda: ask(lane.name).rejected_peers == 1, "its end")
        serves(lane)


def test_a_process_that_asks_repeatedly_and_does_not_read_is_answered_once(lane: Lane) -> None:
    with visit(lane.name) as connection:
        with pytest.raises(ConnectionError):
            while True:
                connection.send(STATUS)
        answers = [receive(connection) for _ in range(3)]  # a reset, for questions left unread, may come first
        assert [(protocol.kind(answer), fds) for answer, fds in answers if answer] == [(protocol.STATUS, [])]
    serves(lane)
    assert lane.stats().malformed_messages == 0


def test_a_process_that_asks_and_hangs_up_does_no_harm(lane: Lane) -> None:
    before = open_files()
    for _ in range(200):
        with visit(lane.name) as connection:
            connection.send(STATUS)
    serves(lane)
    eventually(lambda: not open_files() - before, "the end of all connections")


@pytest.mark.parametrize("kind", [protocol.STATUS, protocol.OFF, protocol.ON])
def test_a_question_after_a_hello_is_not_expected(lane: Lane, kind: int) -> None:
    with welcomed(lane.invitation) as connection:
        connection.send(bytes((kind,)))
        assert f"message {kind} was not expected" in protocol.read_reject(receive(connection)[0])
    assert (lane.stats().joined, lane.state) == ({"tp": []}, "waiting")


@pytest.mark.parametrize("kind", [protocol.STATUS, protocol.OFF, protocol.ON])
def test_a_reader_that_asks_is_not_cut_off(lane: Lane, kind: int) -> None:
    with admitted(lane) as connection:
        connection.send(bytes((kind,)))
        stats = ask(lane.name)
        assert (stats.malformed_messages, stats.joined, stats.state) == (1, {"tp": [0]}, "open")


def ask_as_another_user(pipe: Connection, name: str) -> tuple[str, tuple[bytes, list[int]], bool]:
    """What is said to another user: to who asks by the rules, and to who asks all the same."""
    become(OTHER_UID)
    with pytest.raises(StatusError) as refusal:
        ask(name)
    with visit(name) as connection:
        with suppress(BrokenPipeError):  # rejected before it could say a word
            connection.send(STATUS)
        return str(refusal.value), receive(connection), name in running()


def test_another_user_is_told_nothing(lane: Lane) -> None:
    require_other_users()
    with Child(ask_as_another_user, lane.name) as child:
        reason, answer, listed = child.result()
    assert f"it belongs to user {os.geteuid()}, this is user {OTHER_UID}" in reason
    assert f"you are user {OTHER_UID}" in protocol.read_reject(answer[0]) and not answer[1] and listed
    assert lane.stats().rejected_peers == 2
    serves(lane)


def test_a_status_too_long_for_a_message_is_refused() -> None:
    with Lane({f"{number:0100}": 1 for number in range(1000)}, capacity=4 * MIB) as lane:
        with pytest.raises(StatusError, match=r"a status of \d+ bytes, of which a message holds 65536"):
            ask(lane.name)
        assert lane.stats().rejected_peers == 1


# --- what answers ------------------------------------------------------------------------------------------


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The name of something that is no lane of this version, and answers one question so."""

    def answer(connection: socket.socket, _: Invitation) -> None:
        assert receive(connection) == (STATUS, [])
        for word in answers:
            connection.send(word)

    with impostor(answer) as invitation:
        yield invitation.name


def facts(**changed: object) -> bytes:
    """A good answer, but for these."""
    with Lane({"tp": 1}, capacity=MIB) as lane:
        return protocol.status({**asdict(lane.stats()), **changed})


ANSWERS: dict[str, tuple[tuple[bytes, ...], str]] = {
    "an older lane": ((protocol.reject("message 12 was not expected"),), "message 12 was not expected"),
    "an end": ((), "it hung up"),
    "another message": ((protocol.pairs(protocol.PINNED, [(0, 0)]),), "message 13 instead of a status"),
    "no JSON": ((STATUS + b"\xff{",), "bytes that are not a status"),
    "no object": ((STATUS + b"[1]",), "bytes that are not a status"),
    "a deep list": ((STATUS + b"[" * 60_000,), "bytes that are not a status"),
    "a cut object": ((STATUS + b'{"name": "mm',), "bytes that are not a status"),
    "another version": ((protocol.status({"name": "x", "colour": "red"}),), "another version of mmlane"),
}


@pytest.mark.parametrize(("words", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_makes_no_sense_is_one_clear_error(words: tuple[bytes, ...], reason: str) -> None:
    before = open_files()
    with answering(*words) as name, pytest.raises(StatusError, match=reason) as caught:
        ask(name, DEADLINE)
    assert str(caught.value).startswith(f"lane {name} does not tell its status: ")
    assert "\n" not in str(caught.value)
    assert not open_files() - before


@pytest.mark.parametrize(
    "changed",
    [
        {"degraded": 1},
        {"degraded": [1]},
        {"tickets": "many"},
        {"puts": None},
        {"joined": [0]},
        {"joined": {"tp": 0}},
        {"joined": {"tp": ["0"]}},
        {"expected": {"tp": "x"}},
        {"fallbacks": {"full": []}},
        {"state": "on fire"},
        {"copy_seconds": {}},
    ],
)
def test_facts_of_other_types_are_those_of_another_version(changed: dict[str, object]) -> None:
    """So that who shows them finds what it expects."""
    with answering(facts(**changed)) as name, pytest.raises(StatusError, match="another version of mmlane"):
        ask(name, DEADLINE)


def test_a_queue_that_does_not_move_is_not_waited_for() -> None:
    name = invitation_without_lane().name
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(0)
        with visit(name), pytest.raises(StatusError, match=r"no answer within 0\.1 s"):
            ask(name, timeout=0.1)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_shows_all_lanes_and_why_one_does_not_answer(company: Company) -> None:
    opened, _ = company.open(["tp", "tp", "vit"], capacity=8 * MIB)
    waiting = company.producer({"tp": 2})
    mute = company.producer({"tp": 1})
    names = [company.invitation(producer).name for producer in (opened, waiting, mute)]
    opened.call(Producing.put, 1, MIB)
    waiting.call(Producing.try_put, 1, 1000)
    mute.stop()

    found = {lane["name"]: lane for lane in json.loads(command("status", "--json"))}
    first, second, third = (found[name] for name in names)
    stats = first["stats"]
    assert (first["pid"], first["problem"], stats["name"]) == (opened.pid, None, names[0])
    cmdline = Path(f"/proc/{opened.pid}/cmdline").read_text().replace("\0", " ").split()
    assert first["command"].split() == cmdline
    assert (stats["state"], stats["tickets"], stats["copied_bytes"]) == ("open", 1, MIB)
    assert (stats["expected"], stats["joined"]) == ({"tp": 2, "vit": 1}, {"tp": [0, 1], "vit": [0]})
    assert (second["stats"]["state"], second["stats"]["fallbacks"]) == ("waiting", {"not_open": 1})
    assert (third["pid"], third["stats"], third["command"]) == (mute.pid, None, None)
    assert "no answer within 2 s" in third["problem"]

    said = command("status")
    first, second, third = (said[said.index(name) :].split("\n\n")[0] for name in names)  # blank lines
    for text in ("open", "'tp' 2/2, 'vit' 1/1", "1 MiB used by 1 extent", "1 out", "1 MiB copied"):
        assert text in first, text
    for text in ("waiting for readers: 0 of 'tp', 1 of 'tp'", "'tp' 0/2", "1 not_open"):
        assert text in second, text
    assert "does not tell its status" in third.replace("\n", " ")
    mute.go_on()


def alone(pipe: Connection, words: tuple[str, ...]) -> str:
    """What the command says in a network of its own, where no lane is."""
    checked(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET))
    return command("status", *words)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_no_lane_is_no_error(lane: Lane, words: tuple[str, ...]) -> None:
    require_other_users()  # as root, one can have a network of one's own, too
    with Child(alone, words) as child:
        said = child.result()
    if words:
        assert json.loads(said) == []
    else:
        said = " ".join(said.split())
        assert said.startswith("No lane runs") and "mode lane" in said and "image" in said
        assert "in its log at start, in a line with 'no lane'" in said


@pytest.mark.long
def test_the_command_switches_the_lanes_of_one_process(company: Company) -> None:
    """At once, also for requests that come at that moment; the readers stay, and are served again after `on`."""
    first, (reader,) = company.open(["tp"])
    second, (other,) = company.open(["tp"])
    name = company.invitation(first).name
    held = first.call(Producing.put, 1, 1000)
    assert command("off", str(first.pid)) == f"{name}: off\n"
    refusal = first.call(Producing.try_put, 2, 1000)
    assert isinstance(refusal, Refused) and refusal.cause == "off"
    reader.call(Reading.let_go, reader.call(Reading.take, held))
    carries(second, other)
    assert command("on", str(first.pid)) == f"{name}: open\n"
    carries(first, reader)
    baseline(first)


def test_watching_goes_on_until_ctrl_c(company: Company) -> None:
    producer, _ = company.open(["tp"], capacity=8 * MIB)
    ours, theirs = pty.openpty()
    environ = {**os.environ, "COLUMNS": "100", "LINES": "200", "TERM": "xterm"}
    screen = ""
    words = [*COMMAND, "status", "--watch"]
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

        of_this_lane = rf"{company.invitation(producer).name}((?!mmlane-\d).)*"  # not of another process's lane
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
