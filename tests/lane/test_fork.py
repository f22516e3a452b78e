"""Forked children, and programs that are started: they are no members of a lane, and hide no death."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context
from multiprocessing.process import BaseProcess
from typing import Any, Literal, get_args

import pytest
import torch

from mmlane.lane import Invitation, Lane, LaneError, Reader, failpoints
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.payloads import Sent
from tests.lane.harness.peers import (
    CAPACITY,
    Company,
    Producing,
    Reading,
    baseline,
    carries,
    falls_asleep,
    hears_of_the_end,
    open_gate,
    shut_gate,
    wait_at_gate,
)
from tests.lane.harness.waiting import DEADLINE, eventually

How = Literal["os.fork", "multiprocessing"]
_children: dict[int, BaseProcess | None] = {}  # in a peer: those that were forked there


def fork(live: Callable[[], object], how: How = "os.fork") -> tuple[int, Any]:
    """Fork a child, which stays until it gets SIGUSR1; its process id, and what `live` returned in it.

    It is killed if `live` hangs in there.
    """
    here, there = Pipe()

    def body() -> None:
        signal.alarm(int(DEADLINE / 3))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        there.send(live())
        signal.alarm(int(DEADLINE * 3))
        signal.sigwait({signal.SIGUSR1})

    process: BaseProcess | None = None
    if how == "os.fork":
        pid = os.fork()
        if pid == 0:
            exitcode = 1
            try:
                body()
                exitcode = 0
            finally:
                os._exit(exitcode)  # the frames above are the parent's
    else:
        process = get_context("fork").Process(target=body)
        process.start()
        assert process.pid is not None
        pid = process.pid
    _children[pid] = process
    there.close()
    assert here.poll(DEADLINE), f"the forked child {pid} says nothing"
    return pid, here.recv()


def reap(_: Producing | Reading, pid: int) -> int:
    """Have a child end that was forked here; its exit code."""
    os.kill(pid, signal.SIGUSR1)
    process = _children.pop(pid)
    if process is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    process.join(DEADLINE)
    assert process.exitcode is not None
    return process.exitcode


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only as a zombie that its parent has not reaped."""
    try:
        return "Z" not in kernel.thread_states(pid).values()
    except FileNotFoundError:
        return False


def outcome(attempt: Callable[[], object]) -> str:
    """What comes of something."""
    try:
        return repr(attempt())
    except LaneError as error:
        return f"{type(error).__name__}: {error}"


def fork_a_reader(reading: Reading, invitation: Invitation, sent: Sent, how: How) -> tuple[int, dict[str, str]]:
    """Have a forked child try all that it must not, and let go what it seems to hold."""

    def live() -> dict[str, str]:
        tried = {
            "take": outcome(lambda: reading.reader.take(sent.ticket)),
            "discard": outcome(lambda: reading.reader.discard(sent.ticket)),
            "join": outcome(lambda: reading.reader.join(invitation)),
            "lanes": outcome(reading.reader.lanes),
            "check": outcome(reading.check),
            "close": outcome(reading.reader.close),
        }
        reading.held.clear()
        gc.collect()
        return tried

    return fork(live, how)


@pytest.mark.parametrize("how", get_args(How))
def test_a_child_forked_from_a_reader_is_no_reader(company: Company, how: How) -> None:
    """It can do nothing and sends nothing, and the producer still notices its parent's death (4)."""
    producer, (reader, other) = company.open(["tp", "tp"])
    invitation = company.invitation(producer)
    held, untaken = (producer.call(Producing.put, seed, 10_000) for seed in range(2))
    reader.call(Reading.take, held, "view")
    reader.call(Reading.take, producer.call(Producing.put, 3, 10_000), "cow")
    before = falls_asleep(reader, 0.2)
    pid, tried = reader.call(fork_a_reader, invitation, untaken, how)
    assert tried.pop("check") == "2"
    assert tried.pop("close") == "None"
    assert tried.pop("lanes") == "()"
    for answer in tried.values():
        assert answer.startswith(f"LaneError: this reader belongs to process {reader.pid}")
    stats = producer.call(Producing.stats)
    assert (stats.tickets, stats.malformed_messages, stats.joined) == (3, 0, {"tp": [0, 1]})
    assert reader.call(Reading.check) == 2
    assert set(kernel.sleeps(reader.pid)) == set(before)  # no thread has ended

    assert reader.call(reap, pid) == 0
    carries(producer, reader)
    reader.call(Reading.take, untaken)
    assert reader.call(Reading.check) == 3
    pid, tried = reader.call(fork_a_reader, invitation, untaken, how)
    reader.kill()
    assert is_running(pid)
    eventually(lambda: not producer.call(Producing.is_open), "the producer hears of the death")
    other.call(Reading.take, held)
    other.call(Reading.let_go)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_a_producer(producing: Producing, how: How) -> tuple[int, dict[str, str]]:
    """Have a forked child try all that it must not."""

    def live() -> dict[str, str]:
        lane = producing.lane
        return {
            "put": outcome(lambda: lane.put(torch.zeros(3))),
            "stats": outcome(lane.stats),
            "drain": outcome(lane.drain),
            "is_open": outcome(lambda: lane.is_open),
            "wait_open": outcome(lambda: lane.wait_open(0)),
            "close": outcome(lane.close),
        }

    return fork(live, how)


@pytest.mark.parametrize("how", get_args(How))
def test_a_child_forked_from_a_producer_is_no_producer(company: Company, how: How) -> None:
    """It can do nothing and disturbs nothing, and the reader still notices its parent's death (4)."""
    producer, (reader,) = company.open(["tp"])
    (file,) = kernel.lane_files(producer.pid)
    reader.call(Reading.take, producer.call(Producing.put, 1, 10_000))
    pid, tried = producer.call(fork_a_producer, how)
    assert tried.pop("close") == "None"
    for what, answer in tried.items():
        assert answer.startswith("LaneError") and f"belongs to process {producer.pid}" in answer, what
    assert not [trace for trace in kernel.traces([], [file]) if trace.pid == pid]
    carries(producer, reader)
    assert producer.call(reap, pid) == 0
    carries(producer, reader)

    pid, tried = producer.call(fork_a_producer, how)
    producer.kill()
    assert is_running(pid)
    hears_of_the_end(reader)
    assert reader.call(Reading.check) == 1
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_for_a_lane_of_its_own(producing: Producing) -> tuple[int, list[int]]:
    """Have a forked child be a producer and a reader, both its own."""

    def live() -> list[int]:
        with Lane({"own": 1}, capacity=CAPACITY) as lane, Reader("own") as reader:
            reader.join(lane.invitation)
            assert lane.wait_open(DEADLINE)
            ticket = lane.put(torch.arange(4))
            assert isinstance(ticket, bytes)
            numbers: list[int] = reader.take(ticket).tolist()
            return numbers

    return fork(live)


def test_a_forked_child_can_have_a_lane_of_its_own(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, numbers = producer.call(fork_for_a_lane_of_its_own)
    assert numbers == [0, 1, 2, 3]
    assert producer.call(reap, pid) == 0
    carries(producer, reader)


def fork_amid(producing: Producing, point: str) -> tuple[int, dict[str, str]]:
    """Fork while another thread is at a point of `put`, with whatever it holds there."""
    gate = Gate(point)
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(producing.put, 1, 1000)
        gate.wait()
        result = fork_a_producer(producing, "os.fork")
        gate.open()
        put.result(DEADLINE)
    return result


@pytest.mark.parametrize("point", ["put.allocated", "put.published"])
def test_a_child_forked_while_another_thread_is_in_the_lane_does_not_hang(company: Company, point: str) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, tried = producer.call(fork_amid, point)
    assert [what for what, answer in tried.items() if not answer.startswith("LaneError")] == ["close"]
    assert producer.call(reap, pid) == 0
    carries(producer, reader)


def fork_amid_releasing(reading: Reading, sent: Sent) -> tuple[int, dict[str, str]]:
    """Fork while another thread sends a release."""
    gate = Gate("release.sent")
    with ThreadPoolExecutor(1) as pool:
        letting_go = pool.submit(reading.let_go, 1)
        gate.wait()
        failpoints.probe = None  # nothing in the child is to wait
        result = fork_a_reader(reading, Invitation.make("mmlane-0-0"), sent, "os.fork")
        gate.open()
        letting_go.result(DEADLINE)
    return result


def test_a_child_forked_while_another_thread_releases_says_nothing(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    sent = [producer.call(Producing.put, seed, 1000) for seed in range(3)]
    for one in sent[:2]:
        reader.call(Reading.take, one)
    pid, _ = reader.call(fork_amid_releasing, sent[2])
    stats = producer.call(Producing.stats)
    assert (stats.tickets, stats.malformed_messages) == (2, 0)
    assert reader.call(reap, pid) == 0
    reader.call(Reading.take, sent[2])
    reader.call(Reading.let_go)
    baseline(producer)


def fork_amid_joining(reading: Reading, invitation: Invitation, point: str) -> int:
    """Fork while another thread joins."""
    gate = Gate(point)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(reading.join, invitation)
        gate.wait()
        pid, _ = fork(lambda: None)
        gate.open()
        joining.result(DEADLINE)
    return pid


@pytest.mark.parametrize(
    "point",
    ["join.connected", "join.greeted", "join.received", "join.mapped", "join.stored", "join.acknowledged"],
)
def test_a_child_forked_while_another_thread_joins_hides_no_death(company: Company, point: str) -> None:
    """(4)"""
    producer = company.producer({"tp": 1})
    reader = company.reader("tp")
    pid = reader.call(fork_amid_joining, company.invitation(producer), point)
    assert producer.call(Producing.wait_open)
    carries(producer, reader)
    reader.kill()
    assert is_running(pid)
    eventually(lambda: not producer.call(Producing.is_open), "the producer hears of the death")
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_at_gate(_: Producing) -> int:
    """Fork while another thread is held up at a gate."""
    wait_at_gate(_)
    pid, _nothing = fork(lambda: None)
    open_gate(_)
    return pid


@pytest.mark.parametrize("point", ["accept.connected", "accept.proven", "accept.welcomed", "accept.joined"])
def test_a_child_forked_while_a_reader_is_accepted_hides_no_death(company: Company, point: str) -> None:
    """(4)"""
    producer = company.producer({"tp": 1})
    reader = company.reader("tp")
    producer.call(shut_gate, point)
    reader.start(Reading.join, company.invitation(producer))
    pid = producer.call(fork_at_gate)
    reader.answer()
    assert producer.call(Producing.wait_open)
    carries(producer, reader)
    producer.kill()
    assert is_running(pid)
    hears_of_the_end(reader)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


_programs: list[subprocess.Popen[bytes]] = []  # in a peer


def run_a_program(_: Producing | Reading) -> int:
    """Start a program, which gets all descriptors that can be inherited and outlives this process."""
    _programs.append(subprocess.Popen(["sleep", str(DEADLINE * 3)], close_fds=False))
    return _programs[-1].pid


def test_a_program_that_is_started_gets_nothing_of_a_lane(company: Company) -> None:
    """(4)"""
    producer, (reader, other) = company.open(["tp", "tp"])
    programs = [producer.call(run_a_program), reader.call(run_a_program)]
    try:
        assert not [trace for trace in kernel.traces([], company.files) if trace.pid in programs]
        reader.kill()
        eventually(lambda: not producer.call(Producing.is_open), "the producer hears of the death")
        producer.kill()
        hears_of_the_end(other)
        assert all(map(is_running, programs))
    finally:
        for pid in programs:
            os.kill(pid, signal.SIGKILL)


def fork_after_closing_others(producing: Producing) -> tuple[int, list[int]]:
    """Fork where lanes were closed before, whose descriptors belong to other files by now."""
    for _ in range(3):
        Lane({"x": 1}, capacity=CAPACITY).close()
    closed = [Lane({"x": 1}, capacity=CAPACITY) for _ in range(3)]
    for lane in closed:
        lane.close()
    others = [fd for _ in range(20) for fd in os.pipe()]

    def live() -> list[int]:
        open_there = kernel.descriptors(os.getpid())
        return [fd for fd in others if fd not in open_there]

    try:
        return fork(live)
    finally:
        for fd in others:
            os.close(fd)


def test_a_fork_after_a_lane_was_closed_closes_nothing_of_others(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, missing = producer.call(fork_after_closing_others)
    assert missing == []
    producer.kill()
    hears_of_the_end(reader)
    assert is_running(pid)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")
