"""Calls that meet at odd moments, odd arguments, and a system that fails for a while: they affect no other call.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy
import pytest
import torch

from mmlane.lane import (
    JoinRefused,
    Lane,
    LaneError,
    Reader,
    Refused,
    Reservation,
    StatusError,
    failpoints,
    libc,
    listening,
    outbox,
    status,
)
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, lane_with_readers, put, serves
from tests.lane.harness.payloads import random, same
from tests.lane.harness.sockets import listen, receive, visit
from tests.lane.harness.waiting import DEADLINE, eventually

# --- arguments ---------------------------------------------------------------------------------------------


def test_numpys_integers_are_integers() -> None:
    """All that is told to readers and to `mmlane status` has to be plain."""
    size = numpy.int64(SEGMENT)
    with Lane({"tp": numpy.int64(1)}, capacity=16 * size, pinned=size, segment=size) as lane:
        serves(lane)
    with lane_with_readers() as pair:
        room = pair.lane.reserve((numpy.int64(4), 1024), torch.float32)
        assert isinstance(room, Reservation)
        assert status.ask(pair.lane.name).used_bytes == 4 * 1024 * 4
        assert room.tensor.shape == (4, 1024)
        room.close()
        del room


@pytest.mark.parametrize("shape", [(2.0, 3), ("2", 3), (None,), (-1, 3), 3])
def test_a_malformed_shape_is_an_error_and_changes_nothing(shape: Any) -> None:
    with lane_with_readers() as pair:
        with pytest.raises((ValueError, TypeError)):
            pair.lane.reserve(shape, torch.float32)
        assert pair.lane.is_open
        tensor = random((100,))
        assert same(pair.reader.take(pair.put(tensor)), tensor)


@pytest.mark.parametrize("name", ["capacity", "pinned", "segment"])
def test_a_size_that_is_no_integer_is_an_error(name: str) -> None:
    sizes: dict[str, Any] = {"capacity": SEGMENT, name: 1.5 * SEGMENT}
    with pytest.raises(TypeError):
        Lane({"tp": 1}, **sizes)


def test_a_reservation_whose_tensor_points_elsewhere_is_published_no_further_than_it_reaches() -> None:
    """(1, 2) What is published lies in the room; another memory has to be copied into it."""
    with lane_with_readers() as pair:
        neighbour = pair.put(random((PAGE,), seed=1))
        room = pair.lane.reserve((PAGE,), torch.uint8)
        assert isinstance(room, Reservation)
        room.tensor.data = random((100 * PAGE,))
        with pytest.raises(ValueError, match="not a contiguous part"):
            room.publish()
        with pytest.raises(ValueError, match="not a contiguous part"):
            room.publish(room.tensor[:10])
        room.close()
        pair.discard(neighbour)


@pytest.mark.parametrize("left", [0, 4, 4 * 999])
def test_a_tensor_whose_storage_was_resized_is_refused(left: int) -> None:
    """Copying it would read beyond the storage."""
    tensor = torch.zeros(1000)
    assert tensor.untyped_storage().nbytes() == 4000
    tensor.untyped_storage().resize_(left)
    with lane_with_readers() as pair:
        assert pair.refused(tensor).cause == "unsupported"


@pytest.mark.parametrize("timeout", [-0.3, -1.0, 0.0])
def test_wait_open_with_a_timeout_of_zero_or_less_returns_at_once(timeout: float) -> None:
    with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane:
        assert not lane.wait_open(timeout)
        serves(lane)


# --- moments -----------------------------------------------------------------------------------------------


class Emptied(deque[Any]):
    """Looks as if something were in it, which another thread takes away in the next moment."""

    def __bool__(self) -> bool:
        return True


def test_the_lane_opens_when_its_last_waiting_thread_has_just_timed_out() -> None:
    with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane:
        lane._lifecycle._waiting = Emptied()
        serves(lane)


def test_a_take_whose_pending_release_was_sent_by_a_signal_handler() -> None:
    with lane_with_readers() as pair:
        (link,) = pair.reader._listener.links.values()
        link.dropped = Emptied()
        del link
        tensor = random((100,))
        assert same(pair.reader.take(pair.put(tensor)), tensor)


@pytest.mark.parametrize("point", [point for point in failpoints.READER if point.startswith("join.")])
def test_a_reader_that_is_closed_as_it_joins_leaves_its_number(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any step; and its thread has come to its end by then."""
    with Lane({"tp": 1}, capacity=16 * SEGMENT, segment=SEGMENT) as lane:
        reader = Reader("tp")

        def close(name: str) -> None:
            if name == point:
                monkeypatch.setattr(failpoints, "probe", None)
                reader.close()
                eventually(lambda: reader._listener._events.closed, "the reader's thread has ended")

        monkeypatch.setattr(failpoints, "probe", close)
        with pytest.raises(LaneError, match="this reader is closed"):
            reader.join(lane.invitation, DEADLINE)
        if point == "join.acknowledged":  # it was a member, whose end is the lane's
            eventually(lambda: lane.is_closed, "the end of the lane")
            return
        eventually(lambda: joins(lane), "the number is free again")


def joins(lane: Lane) -> bool:
    """Whether another reader can have the number, which it serves with then."""
    with Reader("tp") as reader:
        try:
            reader.join(lane.invitation, DEADLINE)
        except JoinRefused as refusal:  # the producer has yet to hear of the first one's end
            assert "is here already" in str(refusal)
            return False
        serves(lane, reader)
        return True


class Interrupt(Exception):
    """What a signal handler raises."""


@pytest.mark.parametrize("which", ["lane", "reader"])
def test_an_interrupted_constructor_leaves_no_thread_and_no_socket(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caller has the object then, so none can close it."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise Interrupt

    before, lanes = set(threading.enumerate()), set(status.running())
    with monkeypatch.context() as context, pytest.raises(Interrupt):
        context.setattr(threading.Thread, "start", interrupted)
        _ = Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) if which == "lane" else Reader("tp")
    gc.collect()
    eventually(lambda: not set(threading.enumerate()) - before, "its thread has ended")
    left = {name for name in status.running() if name.startswith(f"mmlane-{os.getpid()}-")}
    assert left <= lanes, "no process listens at its name any more"


# --- signals, and queues -----------------------------------------------------------------------------------


@contextmanager
def full_queue(name: str) -> Iterator[None]:
    """A socket that listens and accepts no connection, and whose queue is full."""
    with listen(name):
        waiting = []
        with suppress(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                waiting[-1].setblocking(False)
                waiting[-1].connect(f"\0{name}")
        yield
        for one in waiting:
            one.close()


def test_a_signal_while_a_process_waits_for_a_place_in_the_queue() -> None:
    """Python takes a connect that a signal breaks into for one that has connected."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane:
            invitation = lane.invitation
        with full_queue(invitation.name):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(StatusError, match="no answer within") as told:
                status.ask(invitation.name, timeout=0.2)
            assert type(told.value) is StatusError  # not of another user's lane
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with Reader("tp") as reader, pytest.raises(JoinRefused, match="no answer within"):
                reader.join(invitation, timeout=0.2)
    finally:
        signal.signal(signal.SIGALRM, before)


# --- a socket that fails -----------------------------------------------------------------------------------


class FakeFailingSend:
    """The outbox's `send` on a system that cannot send for a while: it has no memory for that, say."""

    def __init__(self) -> None:
        self.fails = True
        self.tries = 0

    def __call__(self, *what: Any) -> None:
        self.tries += 1
        if self.fails:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        libc.send(*what)


def test_releases_that_cannot_be_sent_for_a_while_are_sent_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the reader's thread tries it after a while, not all the time."""
    monkeypatch.setattr(listening, "_AFTER_ERROR", 1800.0)
    with lane_with_readers() as pair:
        (link,) = pair.reader._listener.links.values()
        monkeypatch.setattr(outbox, "send", failing := FakeFailingSend())
        pair.reader.take(pair.put(random((100,))))
        links = pair.reader._listener.links.values()
        eventually(lambda: any(one.retry_at for one in links), "the reader's thread has tried")
        assert "its socket fails, trying again" in caplog.text
        assert failing.tries == 2 and pair.lane.stats().tickets == 1
        failing.fails = False
        link.retry_at = 0.0  # it is time
        pair.reader._listener.wake()
        eventually(pair.nothing_is_out, "the release has come")
        assert failing.tries == 3
        del link


def end_while_it_fails(pair: LaneWithReaders) -> float | None:
    """How long the reader's thread sleeps then; no name keeps the link after this."""
    (link,) = pair.reader._listener.links.values()
    pair.reader.take(pair.put(random((100,))))
    eventually(lambda: link.retry_at, "the reader's thread has tried")
    pair.lane.close()
    eventually(lambda: link.gone_at, "the end of the lane")
    return pair.reader._listener._patience()


def test_a_lane_that_ends_while_its_socket_fails_lets_the_readers_thread_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "send", FakeFailingSend())
    with lane_with_readers() as pair:
        patience = end_while_it_fails(pair)
        assert patience is not None and patience > 5  # until the lane is forgotten


# --- a system that can watch no more -----------------------------------------------------------------------


class FakeFullEpoll:
    """An epoll of a user who may watch no more descriptors; the real limit is the whole machine's."""

    def __init__(self, real: select.epoll) -> None:
        self._real = real
        self.is_full = True
        self.was_full = threading.Event()

    def register(self, *what: Any) -> None:
        if self.is_full:
            self.was_full.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._real.register(*what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_lane_that_can_watch_no_more_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A process that connects then is sent away; the next one is let in."""
    with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane:
        admission = lane._control.admission
        full = FakeFullEpoll(admission._events)
        admission._events = full  # type: ignore[assignment]
        with visit(lane.name) as connection:
            assert receive(connection) == (b"", [])
        assert "could not let a reader in" in caplog.text
        full.is_full = False
        serves(lane)


def test_a_reader_that_can_watch_no_more_says_so_when_it_joins() -> None:
    """And its thread goes on."""
    with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane, Reader("tp") as reader:
        full = FakeFullEpoll(reader._listener._events)
        reader._listener._events = full  # type: ignore[assignment]
        with pytest.raises(JoinRefused, match=os.strerror(errno.ENOSPC)):
            reader.join(lane.invitation)
        assert not lane.is_open
        full.is_full = False
        reader.join(lane.invitation)
        serves(lane, reader)


def test_a_reader_that_is_sent_away_when_it_has_joined_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*what: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Lane({"tp": 1}, capacity=16 * SEGMENT, segment=SEGMENT) as lane, Reader("tp") as reader:
        with monkeypatch.context() as patch:
            patch.setattr(lane._control.inbox, "add", fail)
            reader.join(lane.invitation, DEADLINE)
            eventually(lambda: "it sends this reader away: [Errno 28]" in caplog.text, "the reader's line")
        eventually(lambda: joins(lane), "the number is free again")


def test_a_reader_whose_thread_has_failed_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves its lanes, and lets go of their memory."""
    with lane_with_readers() as pair:
        monkeypatch.setattr(pair.reader._listener, "_tidy", lambda: 1 / 0)
        pair.reader._listener.wake()
        eventually(lambda: pair.reader._listener.has_failed, "the thread has failed")
        pair.reader.close()
        assert pair.reader._listener.links == {}
        eventually(lambda: pair.lane.is_closed, "the end of the lane")


# --- puts that are refused ---------------------------------------------------------------------------------


def test_puts_that_are_refused_commit_nothing() -> None:
    """Neither before the lane opens nor once it is off."""
    with Lane({"tp": 1}, capacity=16 * SEGMENT, segment=SEGMENT, idle=0.05) as lane:
        for _ in range(40):
            assert isinstance(lane.put(random((SEGMENT,))), Refused)
        for _ in range(3):  # turns of the control thread
            assert status.ask(lane.name).committed_bytes == 0
        with Reader("tp") as reader:
            reader.join(lane.invitation, DEADLINE)
            assert lane.wait_open(DEADLINE)
            # Memory for the first put was ready then, and goes when it is idle.
            eventually(lambda: status.ask(lane.name).committed_bytes == 0, "nothing is committed")
            lane.switch(off=True)
            for _ in range(40):
                assert isinstance(lane.put(random((SEGMENT,))), Refused)
            for _ in range(3):
                assert status.ask(lane.name).committed_bytes == 0
            lane.switch(off=False)
            reader.discard(put(lane, random((SEGMENT,))))
