"""Signal handlers that raise, at every moment at which Python lets one: no lock stays held, and nothing is lost.

One rule: a producer that is interrupted while it changes its state closes its lane; whatever else is interrupted
is undone when its last reference goes, or can be said again.

`interrupted` raises where CPython runs signal handlers: when a function begins, and when a call of C returns. It
raises in finalizers, too, where Python swallows what is raised. The storms below use real signals.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch

from mmlane.lane import JoinRefused, Lane, LaneError, Mode, Reader, StaleTicket
from mmlane.lane.descriptor import Descriptor, Received, close_dead
from tests.effort import examples
from tests.lane.harness import kernel
from tests.lane.harness.lane_with_readers import SEGMENT, copy
from tests.lane.harness.payloads import MODES, random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

PERIOD = 0.02  # seconds, between the lane's looks at what is out; and after which it asks after a ticket


STEP = examples(7, 1)  # of so many moments, one


class Interrupt(Exception):
    """What a signal handler raises."""


RAISED = (Interrupt, TimeoutError, KeyboardInterrupt)  # the second looks like a failure of the system


@pytest.fixture(autouse=True)
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but an interrupt may be raised in a finalizer."""
    problems: list[BaseException | None] = []

    def hook(found: Any) -> None:
        if found.exc_type not in RAISED:
            problems.append(found.exc_value)

    monkeypatch.setattr(sys, "unraisablehook", hook)
    yield
    assert not problems


def interrupted(work: Callable[[], object], nth: int) -> bool:
    """Raise in this thread's work, at the nth moment; False if it has fewer."""
    left = nth

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            raise RAISED[nth // STEP % len(RAISED)]  # after which Python calls this no more

    sys.setprofile(profile)
    try:
        work()
    except RAISED:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0


class World:
    """A lane and its reader, which come back to rest after whatever was interrupted."""

    def __init__(self) -> None:
        self.lane = Lane({"tp": 1}, capacity=64 * SEGMENT, segment=SEGMENT, idle=PERIOD, orphan=PERIOD)
        self.reader = Reader("tp", linger=PERIOD)
        self.reader.join(self.lane.invitation, DEADLINE)
        assert self.lane.wait_open(DEADLINE)

    def put(self, nbytes: int = 3 * SEGMENT) -> bytes:
        ticket = self.lane.put(random((nbytes,)))
        assert isinstance(ticket, bytes), ticket
        return ticket

    def locks(self) -> list[Any]:
        links = self.reader._listener.links.values()
        return [
            self.lane.guard.lock,
            self.lane._committer.committing,
            self.reader._joining,
            *(link._claiming for link in links),
        ]

    def comes_to_rest(self) -> None:
        """No lock is held; and all is back and the lane serves, or it is closed and its memory is gone."""
        locks = self.locks()

        def all_are_free() -> None:
            for lock in locks:
                assert lock.acquire(timeout=DEADLINE), "a lock is held for ever"
                lock.release()

        with in_a_thread(all_are_free):  # another one: some are reentrant
            pass
        gc.collect()  # an exception's frames may be in a cycle
        eventually(self._is_at_rest, "all is back, or the lane is closed")
        if not self.lane.is_closed:
            tensor = random((SEGMENT,), seed=1)
            ticket = self.lane.put(tensor)
            if isinstance(ticket, bytes):
                assert same(self.reader.take(ticket), tensor)
        if self.lane.is_closed:
            self.lane._control.join()
            assert self.lane._committer.memory is None

    def _is_at_rest(self) -> bool:
        if self.lane.is_closed:
            return True
        stats = self.lane.stats()
        return (stats.tickets, stats.extents, stats.used_bytes) == (0, 0, 0)

    def end(self) -> None:
        self.reader.close()
        self.lane.close()


@contextmanager
def worlds() -> Iterator[Callable[[], World]]:
    """Gives a world whose lane is open; in the end no memory of any is left in this process."""
    before = kernel.lane_files(os.getpid())
    there: list[World] = []

    def world() -> World:
        if not there or there[0].lane.is_closed:
            if there:
                there.pop().end()
            there.append(World())
        return there[0]

    yield world
    while there:
        there.pop().end()
    gc.collect()
    eventually(lambda: kernel.lane_files(os.getpid()) <= before, "the lanes' memory is let go")


# --- every moment ------------------------------------------------------------------------------------------

Case = Callable[[World], Callable[[], object]]  # what to prepare, then what to interrupt


def putting(world: World) -> Callable[[], object]:
    return partial(world.lane.put, random((3 * SEGMENT,)))


def _take(world: World, ticket: bytes, mode: Mode) -> None:
    world.reader.take(ticket, mode)  # and let it go


def taking(world: World, mode: Mode) -> Callable[[], object]:
    return partial(_take, world, world.put(), mode)


def letting_go(world: World, mode: Mode) -> Callable[[], object]:
    held = [world.reader.take(world.put(), mode)]
    return held.clear


def copying(world: World) -> Callable[[], object]:
    tensor = random((SEGMENT,))

    def work() -> None:
        with copy(world.lane, tensor) as room:
            room.publish()
            room.publish()

    return work


def dropping_a_copy(world: World) -> Callable[[], object]:
    held = [copy(world.lane, random((SEGMENT,)))]
    ticket = held[0].publish()
    assert isinstance(ticket, bytes)
    world.reader.discard(ticket)
    return held.clear


def reserving(world: World) -> Callable[[], object]:
    def reserve() -> None:
        room = world.lane.reserve((2, SEGMENT), torch.uint8)
        with room:  # type: ignore[union-attr]
            room.tensor.fill_(1)  # type: ignore[union-attr]
            room.publish(room.tensor[0])  # type: ignore[union-attr]
            room.publish()  # type: ignore[union-attr]

    return reserve


def dropping_a_reservation(world: World) -> Callable[[], object]:
    held = [world.lane.reserve((2, SEGMENT), torch.uint8)]
    return held.clear


def discarding(world: World) -> Callable[[], object]:
    return partial(world.reader.discard, world.put())


def withdrawing(world: World) -> Callable[[], object]:
    return partial(world.lane.withdraw, world.put())


def recalling(world: World) -> Callable[[], object]:
    return partial(world.lane.recall, world.put())


def draining(world: World) -> Callable[[], object]:
    world.reader.take(world.put())
    return world.lane.stats


def waiting_for_it_to_open(world: World) -> Callable[[], object]:
    return partial(world.lane.wait_open, DEADLINE)


CASES: dict[str, Case] = {
    "put": putting,
    **{f"take {mode}": partial(taking, mode=mode) for mode in MODES},
    "let go view": partial(letting_go, mode="view"),
    "let go cow": partial(letting_go, mode="cow"),
    "copy": copying,
    "drop a copy": dropping_a_copy,
    "reserve": reserving,
    "drop a reservation": dropping_a_reservation,
    "discard": discarding,
    "withdraw": withdrawing,
    "recall": recalling,
    "drain": draining,
    "wait": waiting_for_it_to_open,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_interrupt_at_every_moment_leaves_nothing_behind(case: Case) -> None:
    with worlds() as open_world:
        nth = 1 - STEP
        while True:
            nth += STEP
            world = open_world()
            work = case(world)
            was_interrupted = interrupted(work, nth)
            del work
            world.comes_to_rest()
            if not was_interrupted:
                break
    assert nth > 1, "it was interrupted"


def test_a_put_that_is_interrupted_between_its_changes_loses_only_itself() -> None:
    """So an interrupt need not cost the lane; one amid a change does, which the test before has seen, too."""
    closed = survived = 0
    with worlds() as open_world:
        for nth in range(1, 1000, STEP):
            world = open_world()
            if not interrupted(putting(world), nth):
                break
            world.comes_to_rest()
            closed += world.lane.is_closed
            survived += not world.lane.is_closed
    assert closed > 5 and survived > 5


# --- joining and closing -----------------------------------------------------------------------------------


def join_once(reader: Reader, lane: Lane) -> None:
    """A TimeoutError of a signal handler looks like one of the socket."""
    with suppress(JoinRefused):
        reader.join(lane.invitation, DEADLINE)


def test_a_join_that_is_interrupted_can_be_repeated() -> None:
    """The number is free again, or this reader has it (1)."""
    before = kernel.lane_files(os.getpid())
    nth, was_interrupted = 1 - STEP, True
    while was_interrupted:
        nth += STEP
        with Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT) as lane, Reader("tp", linger=PERIOD) as reader:
            was_interrupted = interrupted(partial(join_once, reader, lane), nth)

            def joins(lane: Lane = lane, reader: Reader = reader) -> bool:
                try:
                    reader.join(lane.invitation, DEADLINE)
                except JoinRefused as refusal:  # the producer has yet to hear of the first connection's end
                    assert "is here already" in str(refusal)
                    return False
                return True

            gc.collect()
            eventually(joins, "it joins")
            assert lane.wait_open(DEADLINE)
            tensor = random((100,))
            ticket = lane.put(tensor)
            assert isinstance(ticket, bytes)
            assert same(reader.take(ticket), tensor)
            assert lane.stats().malformed_messages == 0
    assert nth > 20
    gc.collect()
    eventually(lambda: kernel.lane_files(os.getpid()) <= before, "the lanes' memory is let go")


def test_a_close_that_is_interrupted_can_be_repeated() -> None:
    before = kernel.lane_files(os.getpid())
    for end in ("lane", "reader"):
        nth, was_interrupted = 0, True
        while was_interrupted:
            nth += 1
            world = World()
            was_interrupted = interrupted(getattr(world, end).close, nth)
            world.reader.close()
            world.lane.close()
            assert world.lane.is_closed and world.lane._committer.memory is None
        assert nth > 2
    gc.collect()
    eventually(lambda: kernel.lane_files(os.getpid()) <= before, "the lanes' memory is let go")


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8, 13])
def test_descriptors_whose_finalizer_was_interrupted_are_closed_later(nth: int) -> None:
    """With the next one that is made, and by a reader's thread; each once: its number may be another's."""
    fd, other = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))])
        holders = [Received(theirs, 10), Descriptor(fd)]
        numbers = [holder.fd for holder in holders]
        interrupted(holders.clear, nth)
        holders.clear()
        close_dead()
        assert not [number for number in numbers if is_open(number)]
        again = os.open(os.devnull, os.O_RDONLY)
        assert again in numbers
        close_dead()
        assert is_open(again)
    os.close(again)
    os.close(other)


def is_open(number: int) -> bool:
    return Path(f"/proc/self/fd/{number}").is_symlink()


# --- storms ------------------------------------------------------------------------------------------------


@contextmanager
def storm(random: Random, longest: float) -> Iterator[None]:
    """A real signal whose handler raises, again and again, at random moments of the block's work."""

    def handler(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, longest))
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, longest))
        yield
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            except Interrupt:
                continue
            break


def everything(world: World, random: Random) -> None:
    """Something that can be done with a lane and a reader."""
    tensor = torch.zeros(random.choice((1000, SEGMENT, 10 * SEGMENT)), dtype=torch.uint8)
    what = random.randrange(4)
    if what == 0:
        with copy(world.lane, tensor) as kept:
            for _ in range(2):
                ticket = kept.publish()
                if isinstance(ticket, bytes):
                    world.reader.take(ticket, random.choice(MODES))
    elif what == 1:
        room = world.lane.reserve((1000,), torch.uint8)
        ticket = room.publish() if hasattr(room, "publish") else b""
    else:
        ticket = world.lane.put(tensor)
    if isinstance(ticket, bytes) and what == 2:
        world.reader.discard(ticket)
    elif isinstance(ticket, bytes) and what == 3:
        world.reader.take(ticket, random.choice(MODES))


@pytest.mark.parametrize("seed", range(examples(2, 60)))
def test_many_interrupts_lose_nothing(seed: int) -> None:
    random = Random(seed)
    hits = 0
    with worlds() as open_world:
        for _ in range(10):
            world = open_world()
            for _ in range(40):
                try:
                    with storm(random, 4e-4):
                        everything(world, random)
                except Interrupt:
                    hits += 1
                except (StaleTicket, LaneError, AssertionError):  # the last: a refusal, of a lane that is closed
                    pass
            world.comes_to_rest()
    assert hits > 20
