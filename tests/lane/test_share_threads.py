"""Shares in several threads at once, and amid interrupts.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import logging
import sys
import threading
from itertools import count
from types import FrameType
from typing import Any

import pytest

from mmlane.lane import Lane, Reader, Refused, Share, bookkeeping, failpoints, producer
from mmlane.lane import share as sharing
from tests.lane.harness.child import run
from tests.lane.harness.payloads import random, same
from tests.lane.harness.together import PAGE, SEGMENT, Together, held, offset, put
from tests.lane.harness.waiting import DEADLINE


@pytest.mark.parametrize("uses", [2, 4, 10])
def test_puts_that_copy_at_the_same_time(wide: Together, monkeypatch: pytest.MonkeyPatch, uses: int) -> None:
    """None waits for another; the first to be done is what the share holds, if a use is left for it then."""
    tensor, share = random((100,)), wide.lane.share(uses)
    inner: list[bytes] = []

    def probe(name: str) -> None:
        if name == "put.copied" and len(inner) < 3:
            inner.append(b"")
            inner.append(wide.put(tensor, share=share))

    monkeypatch.setattr(failpoints, "probe", probe)
    outer = wide.put(tensor, share=share)
    monkeypatch.setattr(failpoints, "probe", None)
    tickets = [outer, *filter(None, inner), wide.put(tensor, share=share)]
    assert len(tickets) == 5 and len({offset(ticket) for ticket in tickets}) == (4 if uses > 4 else 5)
    for ticket in tickets:
        assert same(wide.reader.take(ticket), tensor)
    assert held(wide.lane.stats()) == (0, uses > 5, uses > 5)
    share.close()


@pytest.mark.parametrize("point", ["put.allocated", "put.copied"])
def test_a_share_that_is_closed_while_it_is_put(
    wide: Together, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whether that is handled before the copy is done or after."""
    for drained in (True, False):
        tensor, share = random((100,)), wide.lane.share(uses=3)

        def probe(name: str, share: Share = share, drained: bool = drained) -> None:
            if name == point:
                share.close()
                if drained:
                    wide.lane.drain()

        monkeypatch.setattr(failpoints, "probe", probe)
        ticket = wide.put(tensor, share=share)
        monkeypatch.setattr(failpoints, "probe", None)
        assert same(wide.reader.take(ticket), tensor)
        assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("spent", [True, False])
def test_one_share_from_several_threads_at_once(wide: Together, spent: bool) -> None:
    problems: list[str] = []
    start = threading.Barrier(4)
    turns = [(random((5000,), seed=turn), wide.lane.share(uses=12 + 3 * (not spent))) for turn in range(100)]

    def work() -> None:
        start.wait(DEADLINE)
        for number, (tensor, share) in enumerate(turns):
            for _ in range(3):
                ticket = wide.lane.put(tensor, share=share)
                if isinstance(ticket, Refused):
                    problems.append(ticket.detail)
                elif not same(wide.reader.take(ticket), tensor):
                    problems.append(f"turn {number}: other bytes")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE)
        assert not thread.is_alive()
    assert problems == []
    stats = wide.lane.stats()
    assert (stats.tickets, stats.puts) == (0, 1200)
    assert held(stats) == ((0, 0, 0) if spent else (0, 100, 200))
    turns.clear()
    assert wide.nothing_is_out()


FILES = {module.__file__ for module in (producer, bookkeeping, sharing)}


class Interrupted(Exception):
    """What a signal handler raises."""


class Interrupt:
    """Raises where Python looks for signals in the lane's bookkeeping, the nth time. Says whether it has.

    That is where a function begins, and where one that is not written in Python has returned.
    """

    def __init__(self, nth: int) -> None:
        self._left = nth
        self.raised = False

    def __enter__(self) -> Interrupt:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename in FILES and event in ("call", "c_return"):
            self._left -= 1
            if self._left == 0:
                self.raised = True
                raise Interrupted


INTERRUPTED = {"first": 0, "second": 1, "last": 2, "close": 2}  # puts before that


def interrupted_everywhere(what: str) -> tuple[int, int]:
    """How many lanes were closed by that, and how many were not."""
    logging.disable()
    ended = unharmed = 0
    tensor = random((PAGE,))
    for nth in count(1):
        with Lane({"tp": 1}, capacity=2 * SEGMENT, segment=SEGMENT) as lane, Reader("tp") as reader:
            reader.join(lane.invitation, DEADLINE)
            assert lane.wait_open(DEADLINE)
            share = lane.share(uses=3)
            for _ in range(INTERRUPTED[what]):
                put(lane, tensor, share=share)
            try:
                with Interrupt(nth) as interrupt:
                    if what == "close":
                        share.close()
                    else:
                        put(lane, tensor, share=share)
            except Interrupted:
                assert interrupt.raised
            if not interrupt.raised:
                return ended, unharmed
            for _ in range(2):  # it can be used, and used up, all the same
                assert isinstance(lane.put(tensor, share=share), bytes) or lane.is_closed
            if lane.is_closed:
                ended += 1
                continue
            unharmed += 1
            share.close()
            # Of a put that was interrupted at its very end nobody has the ticket.
            lane._withdrawn.extend((live.slot, live.serial) for live in lane._tickets.live.values())
            assert held(lane.stats()) == (0, 0, 0), nth
    raise AssertionError


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_signal_handler_that_raises_anywhere(what: str) -> None:
    """The lane has ended with its state, or nothing is lost: no copy without a share or a ticket (2)."""
    ended, unharmed = run(interrupted_everywhere, what)
    if what == "close":
        assert (ended, unharmed) == (0, 1)  # the rest of it is not in Python
    else:
        assert ended > 10 and unharmed > 10
