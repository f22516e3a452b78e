"""`Lane.recall`: tickets that were probably never sent come back soon, and a reader keeps what it holds."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mmlane.lane import MalformedTicket, StaleTicket, failpoints, protocol
from tests.lane.harness.lane_with_readers import lane_with_readers
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import eventually

PERIOD = 0.02  # seconds, between the lane's looks at what is out


def test_a_recalled_ticket_comes_back_and_is_refused_from_then_on() -> None:
    with lane_with_readers(readers=2, idle=PERIOD) as pair:
        ticket = pair.lane.put(random((5000,)))
        assert isinstance(ticket, bytes)
        pair.lane.recall(ticket)
        eventually(lambda: pair.lane.stats().tickets == 0, "the ticket is back")
        assert pair.lane.stats().lost_tickets == 1
        for reader in pair.readers:
            with pytest.raises(StaleTicket):
                reader.take(ticket)


def test_a_reader_that_holds_a_recalled_ticket_keeps_it() -> None:
    """(3, 6) Also when only one of the readers has taken it: the other may still."""
    with lane_with_readers(readers=2, idle=PERIOD) as pair:
        tensor = random((5000,))
        ticket = pair.lane.put(tensor)
        assert isinstance(ticket, bytes)
        held = pair.readers[0].take(ticket)
        other = pair.lane.put(random((5000,), seed=1))
        assert isinstance(other, bytes)
        pair.lane.recall(ticket)
        pair.lane.recall(other)
        eventually(lambda: pair.lane.stats().tickets == 1, "the other ticket is back")
        refused = pair.lane.put(random((5000,), seed=2))
        assert isinstance(refused, bytes)
        assert same(held, tensor)
        for reader in pair.readers:
            reader.discard(refused)
        del held
        eventually(lambda: pair.lane.stats().tickets == 0, "everything is back")


def test_recalling_a_foreign_released_or_malformed_ticket_changes_nothing() -> None:
    with lane_with_readers(idle=PERIOD) as pair, lane_with_readers(idle=PERIOD) as elsewhere:
        foreign = elsewhere.put(random((5000,)))
        ticket = pair.put(random((5000,)))
        pair.discard(ticket)
        again = pair.put(random((5000,)))  # likely in the same slot, with another number
        pair.lane.recall(ticket)
        pair.lane.recall(foreign)
        with pytest.raises(MalformedTicket):
            pair.lane.recall(b"no ticket")
        marker = pair.put(random((5000,), seed=3))
        pair.lane.recall(marker)
        eventually(lambda: pair.lane.stats().lost_tickets == 1, "the marker is back")
        assert same(pair.reader.take(again), random((5000,)))
        assert elsewhere.lane.stats().tickets == 1
        elsewhere.reader.discard(foreign)


def test_a_recall_that_comes_while_the_lane_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ticket may be newer than what the look has seen."""
    with lane_with_readers(idle=PERIOD) as pair:
        recalled: list[bytes] = []

        def recall(point: str) -> None:
            if point == "decommit.chosen" and not recalled:
                recalled.append(pair.put(random((5000,))))
                pair.lane.recall(recalled[0])

        first = pair.put(random((5000,)))
        monkeypatch.setattr(failpoints, "probe", recall)
        eventually(lambda: pair.lane.stats().tickets == 1 and recalled, "the recalled ticket is back")
        assert pair.lane.stats().lost_tickets == 1
        pair.reader.discard(first)


def test_a_recall_that_cannot_be_sent_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader's socket is full, say."""
    with lane_with_readers(idle=PERIOD) as pair:
        send = pair.lane._control.inbox.send
        failed = threading.Event()

        def send_later(kind: int, *what: Any) -> bool:
            if kind == protocol.RECALL and not failed.is_set():
                failed.set()
                return False
            return send(kind, *what)

        monkeypatch.setattr(pair.lane._control.inbox, "send", send_later)
        pair.lane.recall(pair.put(random((5000,))))
        eventually(lambda: pair.lane.stats().tickets == 0, "the recalled ticket is back")
        assert failed.is_set()
