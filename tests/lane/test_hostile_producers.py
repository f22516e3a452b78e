"""Processes that listen where a reader wants to join, and say anything: the reader comes to no harm."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlane.lane import Invitation, JoinRefused, Lane, LaneError, Reader, protocol
from tests.effort import examples
from tests.lane.harness.child import Child, run
from tests.lane.harness.kernel import open_files
from tests.lane.harness.lane_with_readers import put, serves
from tests.lane.harness.sockets import (
    HUGE,
    KINDS,
    MAPPED,
    impostor,
    invitation_without_lane,
    listen,
    receive,
    until_it_hangs_up,
)
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20


def file_of(nbytes: int) -> int:
    """Sealed memory, as a lane's."""
    fd = os.memfd_create("mmlane-test")
    os.ftruncate(fd, nbytes)
    return fd


BASE = 1 << 19
SLOTS = 1 << 16
SIZE = BASE + MIB
NONE = "/nowhere/at/all"
UNNAMED = bytes((protocol.WELCOME,))

# An answer to a HELLO with this nonce from a reader with this invitation, and what descriptor to send with it.
Answer = Callable[[Invitation, str], bytes]


def welcome(nbytes: int, slots: int, path: str) -> Answer:
    """A WELCOME of a producer that knows the secret, with these."""
    return lambda invitation, nonce: protocol.welcome(invitation.secret, nonce, nbytes, slots, path)


def changed(**fields: object) -> Answer:
    """A good WELCOME, but for some fields that were changed after it was proven."""

    def answer(invitation: Invitation, nonce: str) -> bytes:
        good = protocol.welcome(invitation.secret, nonce, SIZE, SLOTS, NONE)
        return good[:1] + json.dumps({**json.loads(good[1:]), **fields}).encode()

    return answer


def plain(message: bytes) -> Answer:
    return lambda invitation, nonce: message


def of_impostor(invitation: Invitation, nonce: str) -> bytes:
    """A WELCOME of a process that has the lane's name, and not its secret."""
    return protocol.welcome(bytes(32), nonce, SIZE, SLOTS, NONE)


def memory() -> int:
    return file_of(SIZE)


WELCOMES: dict[str, tuple[Answer, Callable[[], int] | None]] = {
    "an empty message": (plain(b""), None),
    "random bytes": (plain(b"\xf3\x00\x91garbage"), None),
    "a long message": (plain(b"\x02" * 100_000), None),
    "a welcome cut short": (plain(UNNAMED + b"{"), None),
    "a welcome without fields": (plain(UNNAMED + b"{}"), memory),
    "a welcome of a deep list": (plain(UNNAMED + b"[" * 4000), memory),
    "without the secret": (of_impostor, memory),
    "of another HELLO": (lambda invitation, nonce: welcome(SIZE, SLOTS, NONE)(invitation, "once"), memory),
    "another size than was proven": (changed(nbytes=SIZE + 4096), lambda: file_of(SIZE + 4096)),
    "other slots than were proven": (changed(slots=1), memory),
    "another path than was proven": (changed(path=__file__), None),
    "one field more": (changed(more=1), memory),
    "sizes that are no whole numbers": (changed(nbytes=float(SIZE)), memory),
    "no proof": (changed(proof=""), memory),
    "a welcome of protocol 2": (plain(UNNAMED + b"\x02\x00" + bytes(12) + b"/p"), memory),
    "sorry, in no language": (plain(bytes((protocol.REJECT,)) + b"\xff\xfe"), None),
    "mapped": (plain(MAPPED), memory),
    "no descriptor, and a path to nothing": (welcome(SIZE, SLOTS, NONE), None),
    "no descriptor, and no path": (welcome(SIZE, SLOTS, ""), None),
    "no descriptor, and half a path": (welcome(SIZE, SLOTS, "/dev/\0null"), None),
    "no descriptor, and a path that is no text": (welcome(SIZE, SLOTS, "/dev/\ud800"), None),
    "no descriptor, and a directory": (welcome(SIZE, SLOTS, "/tmp"), None),
    "no descriptor, and a device": (welcome(SIZE, SLOTS, "/dev/null"), None),
    "no descriptor, and another file": (welcome(SIZE, SLOTS, __file__), None),
    "a directory": (welcome(SIZE, SLOTS, NONE), lambda: os.open("/tmp", os.O_RDONLY)),
    "a device": (welcome(SIZE, SLOTS, NONE), lambda: os.open("/dev/zero", os.O_RDONLY)),
    "a descriptor that cannot be read": (welcome(SIZE, SLOTS, NONE), lambda: os.open("/", os.O_PATH)),
    "an event": (welcome(SIZE, SLOTS, NONE), lambda: os.eventfd(0)),
    "an empty file": (welcome(SIZE, SLOTS, NONE), lambda: file_of(0)),
    "too small a file": (welcome(SIZE, SLOTS, NONE), lambda: file_of(BASE // 2)),
    "a file that is one page too small": (welcome(SIZE, SLOTS, NONE), lambda: file_of(SIZE - 4096)),
    "another file, which is too large": (welcome(SIZE, SLOTS, NONE), lambda: file_of(SIZE + 4096)),
    "size 0": (welcome(0, SLOTS, NONE), lambda: file_of(0)),
    "size 0, slots 0": (welcome(0, 0, NONE), lambda: file_of(0)),
    "a size beyond all": (welcome(HUGE, SLOTS, NONE), memory),
    "a size beyond all numbers": (welcome(1 << 200, SLOTS, NONE), memory),
    "a size below all": (welcome(-SIZE, SLOTS, NONE), memory),
    "slots below all": (welcome(SIZE, -1, NONE), memory),
    "a directory larger than the file": (welcome(4096, SLOTS, NONE), lambda: file_of(4096)),
    "a directory beyond all": (welcome(SIZE, (1 << 32) - 1, NONE), memory),
    "a directory beyond all numbers": (welcome(SIZE, 1 << 200, NONE), memory),
}


def join_here_and_there(pipe: Connection, here: Invitation, there: Invitation) -> tuple[str, float, list[str]]:
    """Join an honest lane, then an impostor. Returns what the impostor got one to raise, and the descriptors."""
    with Reader("tp") as reader:
        reader.join(here)
        pipe.send("joined")
        ticket = pipe.recv()
        before = open_files()
        problem = "joined"
        try:
            reader.join(there)
        except LaneError as error:
            problem = f"{type(error).__name__}: {error}"
        gc.collect()
        left = open_files() - before
        assert reader.lanes() == (here.name,)
        return problem, float(reader.take(ticket).sum()), list(left)


@pytest.mark.parametrize(("answer", "make"), WELCOMES.values(), ids=WELCOMES.keys())
def test_an_invalid_welcome_is_refused(lane: Lane, answer: Answer, make: Callable[[], int] | None) -> None:
    """With JoinRefused: without SIGBUS, without a descriptor left, and other lanes are as before."""
    heard: list[bytes] = []

    def behave(connection: socket.socket, invitation: Invitation) -> None:
        message = answer(invitation, nonce_of(connection, invitation))
        with ExitStack() as scope:
            fds = [] if make is None else [make()]
            for fd in fds:
                scope.callback(os.close, fd)
            socket.send_fds(connection, [message], fds) if fds else connection.send(message)
            heard.extend(until_it_hangs_up(connection))

    with (
        impostor(behave) as invitation,
        Child(join_here_and_there, lane.invitation, invitation) as child,
    ):
        assert child.hear() == "joined"
        assert lane.wait_open(DEADLINE)
        child.say(put(lane, torch.ones(100)))
        problem, total, left = child.result()
    assert problem.startswith(f"JoinRefused: lane {invitation.name}"), problem
    assert (total, left) == (100.0, [])
    assert all(protocol.kind(message) == protocol.REJECT for message in heard), "it did not say MAPPED"


def nonce_of(connection: socket.socket, invitation: Invitation) -> str:
    """The nonce of a reader's HELLO, which is a good one."""
    message, fds = receive(connection)
    hello = protocol.read_hello(message)
    assert protocol.is_proven(hello, invitation.secret) and (hello.group, hello.number, fds) == ("tp", 0, [])
    return hello.nonce


def test_no_two_hellos_are_the_same() -> None:
    """So that no answer serves twice."""
    nonces: list[str] = []
    with impostor(lambda *of: nonces.append(nonce_of(*of)), visitors=2) as invitation:
        refusal(invitation)
    assert len(set(nonces)) == 2


def refusal(invitation: Invitation, timeout: float = DEADLINE) -> str:
    """Why a new reader cannot join, asked twice."""
    said = []
    with Reader("tp") as reader:
        for _ in range(2):
            try:
                reader.join(invitation, timeout)
            except JoinRefused as error:
                said.append(str(error))
            assert reader.lanes() == ()
    assert said[0] == said[1]
    return said[0]


def test_a_path_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def behave(connection: socket.socket, invitation: Invitation) -> None:
        nonce = nonce_of(connection, invitation)
        connection.send(protocol.welcome(invitation.secret, nonce, SIZE, SLOTS, str(tmp_path / "pipe")))
        until_it_hangs_up(connection)

    with impostor(behave, visitors=2) as invitation:
        assert "could not be mapped" in run(refusal, invitation)


@given(
    message=st.binary(max_size=300)
    | st.builds(bytes.__add__, st.just(bytes((protocol.WELCOME,))), st.binary(max_size=80))
)
@settings(max_examples=examples(100, 1000))
def test_random_answers_to_a_hello(message: bytes) -> None:
    def behave(connection: socket.socket, _: Invitation) -> None:
        receive(connection)
        connection.send(message)
        until_it_hangs_up(connection)

    before = open_files()
    with impostor(behave, visitors=2) as invitation:
        assert refusal(invitation).startswith(f"lane {invitation.name}")
    eventually(lambda: not open_files() - before, "the end of the reader")


def test_a_join_ends_in_time_at_a_producer_that_says_nothing() -> None:
    with impostor(lambda connection, _: until_it_hangs_up(connection), visitors=2) as invitation:
        assert "no answer within 0.1 s" in refusal(invitation, timeout=0.1)


@contextmanager
def full_queue() -> Iterator[tuple[Invitation, socket.socket, int]]:
    """An invitation, its listener, and how many wait there already; more do not get in."""
    invitation = invitation_without_lane()
    with listen(invitation.name) as listener, ExitStack() as scope:
        for waiting in range(100):
            connection = scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.setblocking(False)
            try:
                connection.connect(f"\0{invitation.name}")
            except BlockingIOError:
                yield invitation, listener, waiting
                return
        raise AssertionError("the queue is never full")


def test_a_join_ends_in_time_at_a_producer_that_accepts_no_connection() -> None:
    with full_queue() as (invitation, _, _):
        assert "no answer within 0.1 s" in refusal(invitation, timeout=0.1)


def test_a_reader_waits_in_a_full_queue() -> None:
    said: list[str] = []
    with full_queue() as (invitation, listener, crowd):
        reader = threading.Thread(target=lambda: said.append(refusal(invitation)), daemon=True)
        reader.start()
        reader.join(0.2)
        assert reader.is_alive(), "it did not wait"
        for place in range(crowd + 2):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                if place >= crowd:
                    connection.send(protocol.reject("it is your turn"))
                    until_it_hangs_up(connection)
        reader.join(DEADLINE)
    assert ["it is your turn" in reason for reason in said] == [True]


# --- after MAPPED ------------------------------------------------------------------------------------------


def let_in(connection: socket.socket, invitation: Invitation, fd: int, copies: int = 1) -> None:
    """Do all that a producer does for a reader, until it is a member."""
    nonce = nonce_of(connection, invitation)
    welcome = protocol.welcome(invitation.secret, nonce, SIZE, SLOTS, NONE)
    socket.send_fds(connection, [welcome], [fd] * copies)
    assert receive(connection) == (MAPPED, [])


@pytest.mark.parametrize("last", ["nothing", "its end", "a descriptor", "a rejection", "noise"])
def test_a_reader_that_has_mapped_the_memory_is_joined(last: str) -> None:
    """It waits for nothing then, and hangs up for nothing that is said; when the lane has ended, it joins anew."""
    fd = file_of(SIZE)
    go_on = threading.Event()

    def behave(connection: socket.socket, invitation: Invitation) -> None:
        let_in(connection, invitation, fd)
        if last == "a descriptor":
            socket.send_fds(connection, [protocol.pairs(protocol.PINNED, [(BASE, 4096)])], [fd])
        elif last == "a rejection":
            connection.send(protocol.reject("no more"))
        elif last == "noise":
            connection.send(b"\xf3garbage")
        if last != "its end":
            assert go_on.wait(DEADLINE)
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):  # it has not hung up
                connection.recv(1)

    def joins_and_hears_of_the_end(invitation: Invitation) -> None:
        with Reader("tp") as reader:
            for _ in range(2):
                go_on.clear()
                reader.join(invitation, DEADLINE)
                assert last == "its end" or reader.lanes() == (invitation.name,)
                go_on.set()
                eventually(lambda: reader.lanes() == (), "the reader hears of the end")

    before = open_files()
    with impostor(behave, visitors=2) as invitation:
        joins_and_hears_of_the_end(invitation)
    os.close(fd)
    eventually(lambda: not open_files() - before, "the end of the reader")


# What a producer may say, and whether it makes sense.
WORDS_FOR_A_READER: dict[str, tuple[bytes, bool]] = {
    "random bytes": (b"\xf3\x00\x91garbage", False),
    "a longer message than there are": (protocol.pairs(protocol.PINNED, [(BASE, 4096)] * 1000), False),
    "an empty message": (b"", False),
    "half a pair": (bytes((protocol.PINNED,)) + b"12345678", False),
    "memory beyond the end": (protocol.pairs(protocol.PINNED, [(SIZE - 4096, 8192)]), False),
    "memory beyond all": (protocol.pairs(protocol.PINNED, [(HUGE, HUGE)]), False),
    "more memory than there is": (protocol.pairs(protocol.PINNED, [(0, HUGE)]), False),
    "memory far away": (protocol.pairs(protocol.PINNED, [(1 << 63, 4096)]), False),
    "memory between pages": (protocol.pairs(protocol.PINNED, [(BASE + 7, 100)]), False),
    "no memory": (protocol.pairs(protocol.PINNED, [(BASE, 0)]), False),
    "memory that is there": (protocol.pairs(protocol.PINNED, [(BASE, MIB)]), True),
    "tickets beyond all recalled": (protocol.pairs(protocol.RECALL, [(HUGE, HUGE), (0, 0)]), True),
    "a welcome": (protocol.welcome(bytes(32), "n", SIZE, SLOTS, NONE), False),
    **{
        name: (protocol.pairs(kind, [(1, 1)]), False)
        for name, kind in KINDS.items()
        if kind not in (protocol.PINNED, protocol.RECALL)
    },
}


@pytest.mark.parametrize(("word", "makes_sense"), WORDS_FOR_A_READER.values(), ids=WORDS_FOR_A_READER.keys())
def test_messages_after_a_malformed_one_are_handled(
    lane: Lane, caplog: pytest.LogCaptureFixture, word: bytes, makes_sense: bool
) -> None:
    """To hang up would end its lane. Nothing else happens, to this lane or to others."""
    heard = threading.Event()
    fd = file_of(SIZE)

    def behave(connection: socket.socket, invitation: Invitation) -> None:
        let_in(connection, invitation, fd)
        socket.send_fds(connection, [word], [fd] * 100)
        connection.send(protocol.pairs(protocol.RECALL, [(7, 7)]))
        while (answer := receive(connection)[0]) != protocol.pairs(protocol.NOT_SEEN, [(7, 7)]):
            assert answer, "it hung up"
        heard.set()
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        before = open_files()
        with impostor(behave) as invitation:
            reader.join(invitation)
            assert heard.wait(DEADLINE)
            assert set(reader.lanes()) == {lane.name, invitation.name}
            ignored = ["ignoring a malformed message" in record.message for record in caplog.records]
            assert ignored == ([] if makes_sense else [True])
            assert os.fstat(fd).st_blocks * 512 <= BASE + 8192, "it committed the producer's memory"
            serves(lane, reader)
            reader.close()
    os.close(fd)
    eventually(lambda: not open_files() - before, "the end of the reader")


def test_more_descriptors_than_one_are_closed() -> None:
    fd = file_of(SIZE)

    def behave(connection: socket.socket, invitation: Invitation) -> None:
        let_in(connection, invitation, fd, copies=100)
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        before = open_files()
        with impostor(behave) as invitation:
            reader.join(invitation)
            # a listener, both ends of a connection, the memory
            assert (open_files() - before).total() == 4
            reader.close()
    os.close(fd)
