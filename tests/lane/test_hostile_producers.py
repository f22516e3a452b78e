"""Whoever listens where a reader wants to join, and whatever they say: the reader comes to no harm."""

from __future__ import annotations

import gc
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlane.lane import JoinRefused, Lane, LaneError, Reader, wire
from tests.effort import examples
from tests.lane.harness.child import Child, run
from tests.lane.harness.kernel import open_files
from tests.lane.harness.sockets import HUGE, KINDS, MAPPED, impostor, listen, receive, until_it_hangs_up
from tests.lane.harness.together import put, serves
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20


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
    "a welcome cut short": (bytes((protocol.WELCOME,)) + b"\x01\x00", None),
    "a welcome whose path is no text": (protocol.welcome(SIZE, 65536, "") + b"\xff", None),
    "another version": (bytes((protocol.WELCOME,)) + struct.pack("<HQI", 99, SIZE, 65536), lambda: file_of(SIZE)),
    "sorry, in no language": (bytes((protocol.REJECT,)) + b"\xff\xfe", None),
    "mapped": (MAPPED, lambda: file_of(SIZE)),
    "no descriptor, and a path to nothing": (protocol.welcome(SIZE, 65536, NONE), None),
    "no descriptor, and no path": (protocol.welcome(SIZE, 65536, ""), None),
    "no descriptor, and half a path": (protocol.welcome(SIZE, 65536, "/dev/\0null"), None),
    "no descriptor, and a directory": (protocol.welcome(SIZE, 65536, "/tmp"), None),
    "no descriptor, and a device": (protocol.welcome(SIZE, 65536, "/dev/null"), None),
    "no descriptor, and another file": (protocol.welcome(SIZE, 65536, __file__), None),
    "a directory": (protocol.welcome(SIZE, 65536, NONE), lambda: os.open("/tmp", os.O_RDONLY)),
    "a device": (protocol.welcome(SIZE, 65536, NONE), lambda: os.open("/dev/zero", os.O_RDONLY)),
    "a descriptor that cannot be read": (protocol.welcome(SIZE, 65536, NONE), lambda: os.open("/", os.O_PATH)),
    "an event": (protocol.welcome(SIZE, 65536, NONE), lambda: os.eventfd(0)),
    "an empty file": (protocol.welcome(SIZE, 65536, NONE), lambda: file_of(0)),
    "too small a file": (protocol.welcome(SIZE, 65536, NONE), lambda: file_of(BASE // 2)),
    "a file that is one page too small": (protocol.welcome(SIZE, 65536, NONE), lambda: file_of(SIZE - 4096)),
    "another file, which is too large": (protocol.welcome(SIZE, 65536, NONE), lambda: file_of(SIZE + 4096)),
    "size 0": (protocol.welcome(0, 65536, NONE), lambda: file_of(0)),
    "size 0, slots 0": (protocol.welcome(0, 0, NONE), lambda: file_of(0)),
    "a size beyond all": (protocol.welcome(HUGE, 65536, NONE), lambda: file_of(SIZE)),
    "a directory larger than the file": (protocol.welcome(4096, 65536, NONE), lambda: file_of(4096)),
    "a directory beyond all": (protocol.welcome(SIZE, (1 << 32) - 1, NONE), lambda: file_of(SIZE)),
}


def join_here_and_there(pipe: Connection, here: str, there: str) -> tuple[str, float, list[str]]:
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
        assert reader.lanes() == (here,)
        return problem, float(reader.take(ticket).sum()), list(left)


@pytest.mark.parametrize("answer", WELCOMES.values(), ids=WELCOMES.keys())
def test_a_welcome_that_is_none_is_refused(lane: Lane, answer: Answer) -> None:
    """With JoinRefused: without SIGBUS, without a descriptor left, and other lanes are as before."""
    message, make = answer
    heard: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        assert receive(connection) == (protocol.hello("tp"), [])
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
    assert all(protocol.kind(message) == protocol.REJECT for message in heard), "it did not say MAPPED"


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
        connection.send(protocol.welcome(SIZE, 65536, str(tmp_path / "pipe")))
        until_it_hangs_up(connection)

    with impostor(behave, visitors=2) as address:
        assert "could not be mapped" in run(refusal, address)


@given(
    message=st.binary(max_size=300)
    | st.builds(bytes.__add__, st.just(bytes((protocol.WELCOME,))), st.binary(max_size=80))
)
@settings(max_examples=examples(100, 1000))
def test_random_answers_to_a_greeting(message: bytes) -> None:
    def behave(connection: socket.socket) -> None:
        receive(connection)
        connection.send(message)
        until_it_hangs_up(connection)

    before = open_files()
    with impostor(behave, visitors=2) as address:
        assert refusal(address).startswith(f"lane {address}")
    eventually(lambda: not open_files() - before, "the end of the reader")


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
                    connection.send(protocol.reject("it is your turn"))
                    until_it_hangs_up(connection)
        reader.join(DEADLINE)
    assert ["it is your turn" in reason for reason in said] == [True]


@pytest.mark.parametrize("last", ["nothing", "its end", "a descriptor", "sorry", "noise"])
def test_a_producer_that_does_not_let_one_in(last: str) -> None:
    """The join is refused, and so is the next one: nothing of the first is left."""

    def behave(connection: socket.socket) -> None:
        receive(connection)
        fd = file_of(SIZE)
        socket.send_fds(connection, [protocol.welcome(SIZE, 65536, NONE)], [fd])
        assert receive(connection)[0] == MAPPED
        if last == "nothing":
            until_it_hangs_up(connection)
        elif last == "a descriptor":
            socket.send_fds(connection, [bytes((protocol.WARM,))], [fd])
        elif last != "its end":
            connection.send(protocol.reject("no more") if last == "sorry" else b"\xf3garbage")
        os.close(fd)

    before = open_files()
    with impostor(behave, visitors=2) as address:
        reason = refusal(address, timeout=1.0 if last == "nothing" else DEADLINE)
        assert f"lane {address} could not be joined" in reason
    eventually(lambda: not open_files() - before, "the end of the reader")


# What a producer may say, and whether it makes sense.
WORDS_FOR_A_READER: dict[str, tuple[bytes, bool]] = {
    "random bytes": (b"\xf3\x00\x91garbage", False),
    "a longer message than there are": (protocol.pairs(protocol.WARM, [(0, 4096)] * 1000), False),
    "an empty message": (b"", False),
    "half a pair": (bytes((protocol.WARM,)) + b"12345678", False),
    "memory beyond the end": (protocol.pairs(protocol.WARM, [(SIZE - 4096, 8192)]), False),
    "memory beyond all": (protocol.pairs(protocol.WARM, [(HUGE, HUGE)]), False),
    "more memory than there is": (protocol.pairs(protocol.WARM, [(0, HUGE)]), False),
    "memory far away": (protocol.pairs(protocol.WARM, [(1 << 63, 4096)]), False),
    "memory between pages": (protocol.pairs(protocol.WARM, [(BASE + 7, 100)]), True),
    "no memory": (protocol.pairs(protocol.WARM, [(BASE, 0)]), True),
    "cold memory beyond all": (protocol.pairs(protocol.COLD, [(HUGE, HUGE)]), True),
    "tickets beyond all revoked": (protocol.pairs(protocol.RECALL, [(HUGE, HUGE), (0, 0)]), True),
    **{
        name: (protocol.pairs(kind, [(1, 1)]), False)
        for name, kind in KINDS.items()
        if kind not in (protocol.WARM, protocol.COLD, protocol.RECALL)
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
        socket.send_fds(connection, [protocol.welcome(SIZE, 65536, NONE)], [fd])
        assert receive(connection)[0] == MAPPED
        connection.send(protocol.pairs(protocol.JOINED, [(0, 0)]))
        socket.send_fds(connection, [word], [fd] * 100)
        connection.send(protocol.pairs(protocol.RECALL, [(7, 7)]))
        while (answer := receive(connection)[0]) != protocol.pairs(protocol.NOT_SEEN, [(7, 7)]):
            assert answer, "it hung up"
        heard.set()
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        reader.join(lane.invitation)
        before = open_files()
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
    eventually(lambda: not open_files() - before, "the end of the reader")


def test_more_descriptors_than_one_are_closed() -> None:
    fd = file_of(SIZE)

    def behave(connection: socket.socket) -> None:
        receive(connection)
        socket.send_fds(connection, [protocol.welcome(SIZE, 65536, NONE)], [fd] * 100)
        receive(connection)
        connection.send(protocol.pairs(protocol.JOINED, [(0, 0)]))
        until_it_hangs_up(connection)

    with Reader("tp") as reader:
        before = open_files()
        with impostor(behave) as address:
            reader.join(address)
            # a listener, both ends of a connection, the memory
            assert (open_files() - before).total() == 4
            reader.close()
    os.close(fd)
