"""Neither a put, nor a take, nor a finalizer waits for a log handler, lost tickets, or a lane's threads."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mmlane.lane import failpoints
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, copy, lane_with_readers
from tests.lane.harness.payloads import MODES, random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

PERIOD = 0.05  # seconds, between the lane's looks at what is out
LOST = 20_000


class StandingStill(logging.Handler):
    """A handler in which every thread that logs stands still, as at a full pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []  # that came
        self.came, self.go_on = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.threads.append(threading.current_thread().name)
        self.came.set()
        assert self.go_on.wait(DEADLINE)


@contextmanager
def standing_still() -> Iterator[StandingStill]:
    logger = logging.getLogger("mmlane.lane")
    handler, level = StandingStill(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        handler.go_on.set()
        logger.removeHandler(handler)
        logger.setLevel(level)


def everything(pair: LaneWithReaders) -> None:
    """All that a producer and a reader do in requests, and what may go wrong there; memory is committed, too."""
    for seed, nbytes in enumerate((100, 2 * SEGMENT, 5 * SEGMENT)):
        for mode in MODES:
            tensor = random((nbytes,), seed=seed)
            taken = pair.reader.take(pair.put(tensor), mode)
            assert same(taken, tensor)
            del taken
    pair.reader.discard(pair.put(random((100,))))
    pair.lane.withdraw(pair.put(random((100,))))
    pair.lane.recall(pair.put(random((100,))))
    with copy(pair.lane, random((100,))) as room:
        ticket = room.publish()
        assert isinstance(ticket, bytes)
        pair.reader.discard(ticket)
    pair.refused(torch.zeros(1, dtype=torch.uint8).expand(17 * SEGMENT))
    pair.refused(torch.zeros(9, device="meta"))
    pair.lane.drain()


@pytest.mark.parametrize("whose", ["producer", "reader"])
def test_a_blocked_log_handler_holds_up_only_the_thread_that_logs(whose: str) -> None:
    with lane_with_readers(idle=PERIOD) as pair, standing_still() as handler:
        (member,) = pair.lane.members
        if whose == "producer":
            pair.reader._listener.links[pair.lane.name].connection.send(b"\xff")  # a malformed message
            pair.lane.drain()  # which its control thread logs a line of
        else:
            pair.lane._control.inbox.send(0xFF, [(0, 0)], member)
        assert handler.came.wait(DEADLINE)
        with in_a_thread(lambda: everything(pair)):
            pass
        assert len(handler.threads) == 1 and handler.threads[0] != threading.current_thread().name
        handler.go_on.set()
        pair.wait_until_nothing_is_out()
        pair.lane._issuer.malformed_messages = 0  # that one was ours


# --- lost tickets ------------------------------------------------------------------------------------------


def test_many_lost_tickets_are_few_lines_and_hold_up_no_put(caplog: pytest.LogCaptureFixture) -> None:
    """One line a look, with the number. While readers are asked after them, the lock is free."""
    looks = 0

    class Counting(Gate):
        def __call__(self, name: str) -> None:
            nonlocal looks
            looks += name == "decommit.chosen"
            super().__call__(name)

    tensor = random((PAGE,))
    with lane_with_readers(2, idle=PERIOD, orphan=PERIOD) as pair:
        gate = Counting("recall.sent")
        with copy(pair.lane, tensor) as room:
            assert all(isinstance(room.publish(), bytes) for _ in range(LOST))
        gate.wait()  # the control thread stands there
        with in_a_thread(lambda: pair.lane.withdraw(pair.put(tensor))):
            pass
        pair.lane.drain()
        gate._open.set()  # and the probe goes on counting
        eventually(lambda: pair.lane.stats().tickets == 0, "all are reclaimed")
        eventually(lambda: pair.lane.housekeeping._lost == pair.lane.stats().lost_tickets == LOST, "the last line")
        failpoints.probe = None
    lines = [record.getMessage() for record in caplog.records if "were reclaimed" in record.getMessage()]
    numbers = [int(re.findall(r": (\d+) tickets", line)[0]) for line in lines]
    assert sum(numbers) == LOST
    assert len(lines) <= looks + 1 and len(lines) < 200


# --- finalizers --------------------------------------------------------------------------------------------


def test_finalizers_return_while_the_readers_thread_stands_still() -> None:
    """Both of what was taken and of what was not."""
    with lane_with_readers(idle=PERIOD, orphan=PERIOD) as pair:
        held = [pair.reader.take(pair.put(random((SEGMENT,))), mode) for mode in MODES]
        gate = Gate("recall.heard")
        gate.wait()  # it is asked after one that it holds
        discarded = pair.put(random((100,)))

        def let_go() -> None:
            held.clear()
            pair.reader.discard(discarded)

        with in_a_thread(let_go):
            pass
        eventually(lambda: pair.lane.stats().tickets == 1, "what was held is released; the other is left to it")
        gate.open()
        pair.wait_until_nothing_is_out()
