"""Several threads at once, and Python's collector anywhere: tickets are released without waiting for a lock."""

from __future__ import annotations

import sys
from operator import attrgetter

import pytest
import torch

from mmlane.lane import Refused, failpoints, link
from mmlane.lane.ticket import digest
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, published
from tests.lane.harness.payloads import MODES, SHAPE, random, same
from tests.lane.harness.programs import run_beside_a_lane
from tests.lane.harness.waiting import eventually, in_threads


def test_several_threads_put_and_take(pair: LaneWithReaders) -> None:
    def work(which: int) -> None:
        for turn in range(120):
            size = (17, 3 * PAGE, SEGMENT + 9)[(which + turn) % 3]
            tensor = torch.full((size,), (which * 40 + turn) % 251, dtype=torch.uint8)
            ticket = pair.lane.put(tensor)
            if isinstance(ticket, Refused):
                assert ticket.cause == "full"
                continue
            if turn % 7 == 0:
                pair.lane.withdraw(ticket)
                continue
            taken = pair.reader.take(ticket, MODES[turn % 3])
            assert same(taken, tensor)

    in_threads([lambda which=which: work(which) for which in range(4)])  # type: ignore[misc]
    pair.wait_until_nothing_is_out()  # of two releases at once the reader's thread sends one
    assert pair.lane.stats().malformed_messages == 0


def test_tensors_may_be_let_go_by_any_thread(pair: LaneWithReaders) -> None:
    with pair.copy(random((100,))) as copy:
        queue = [[pair.reader.take(published(copy)) for _ in range(200)] for _ in range(4)]
    assert pair.lane.stats().tickets == 800
    in_threads([part.clear for part in queue])
    eventually(lambda: pair.lane.stats().tickets == 0, "all are heard of")  # more than the socket holds at once


def test_more_releases_at_once_than_the_socket_holds(pair: LaneWithReaders) -> None:
    """They wait in the reader, and go on when the producer reads."""
    with pair.copy(random((10,))) as copy:
        tickets = [published(copy) for _ in range(20_000)]
    for ticket in tickets:
        pair.reader.discard(ticket)
    eventually(lambda: pair.lane.stats().tickets == 0, "all are heard of")
    assert pair.lane.stats().malformed_messages == 0


COLLECTED_ANYWHERE = """
    from mmlane.lane import Refused
    lane, (reader, other) = pair.lane, pair.readers
    tensors = [random((size,), seed=size) for size in (5, PAGE, 3 * PAGE)]
    left = [0]

    class Last:
        # A finalizer that does all that is allowed wherever Python collects.
        def __init__(self, ticket):
            self.ticket = ticket

        def __del__(self):
            left[0] += 1
            reader.discard(self.ticket)

    class Unsent(Last):
        def __del__(self):
            left[0] += 1
            lane.withdraw(self.ticket)

    def have(make, *args):
        def made():
            answer = make(*args)
            if not isinstance(answer, Refused):
                return answer
            assert answer.cause == "full", answer  # a thread that releases may wait for its turn
        return eventually(made, "there is room")

    def issue(turn, tensor):
        # Tickets for copies of their own, for one copy, for both; and what is kept is collected some time.
        if turn % 3 == 0:
            return [have(lane.put, tensor) for _ in range(4)]
        copy = have(lane.copy, tensor)
        cycle(copy)
        return [copy.publish() if number <= turn % 4 else have(lane.put, tensor) for number in range(4)]

    def cycle(*what):
        inside = list(what)
        inside.append(inside)

    gc.set_threshold(1, 1, 1)

    def work(which):
        for turn in range(150):
            tickets = issue(turn, tensors[(turn + which) % 3])
            cycle(reader.take(tickets[0]), reader.take(tickets[1], "cow")[:2])
            other.discard(tickets[0]), other.discard(tickets[1]), other.discard(tickets[2])
            cycle(Last(tickets[2]))
            cycle(Unsent(tickets[3]))
            if turn % 10 == 0:
                lane.stats()

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.set_threshold(700, 10, 10)
    gc.collect()
    assert left == [THREADS * 300], left
    eventually(lambda: lane.stats().tickets == 0, "all tickets have ended")
    assert lane.stats().malformed_messages == 0
    assert lane.stats().used_bytes == 0
    reader.close(), other.close(), lane.close()
    print("well")
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_are_collected_wherever_python_likes(threads: int) -> None:
    """In the middle of `put`, `take` and `stats` too, while their locks are held: nothing there waits for one."""
    ended = run_beside_a_lane(COLLECTED_ANYWHERE.replace("THREADS", str(threads)))
    assert (ended.returncode, ended.stdout) == (0, "well\n"), ended.stderr[-3000:]
    assert ended.stderr == ""


@pytest.mark.timeout(120)  # it hangs if it fails
@pytest.mark.parametrize("lock", ["guard.lock", "_committer.committing"])
def test_letting_go_waits_for_no_lock_of_the_lane(pair: LaneWithReaders, lock: str) -> None:
    """The one above made certain, for the locks of the producer."""
    taken = pair.reader.take(pair.put(random(SHAPE)))
    ticket = pair.put(random((7,)))
    with attrgetter(lock)(pair.lane):
        del taken
        pair.lane.withdraw(ticket)
    assert pair.lane.stats().tickets == 0


@pytest.mark.timeout(120)  # it hangs if it fails
def test_letting_go_waits_for_no_lock_of_the_reader(pair: LaneWithReaders) -> None:
    """Another thread's tensor is let go while one takes."""
    taken, ticket = [pair.reader.take(pair.put(random(SHAPE)))], pair.put(random((8,)))
    with pair.reader._listener.links[pair.lane.name]._claiming:
        in_threads([taken.clear])
        assert pair.lane.stats().tickets == 1
        pair.reader.discard(ticket)  # which leaves it to the reader's thread
    eventually(pair.nothing_is_out, "the ticket is discarded")


@pytest.mark.timeout(120)  # it hangs if it fails
def test_letting_go_amid_a_take_of_the_same_thread(pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collection in the middle of it does."""
    held = [pair.reader.take(pair.put(random(SHAPE)))]
    ticket = pair.put(random((8,)))

    def digest_and_collect(ticket: bytes) -> int:
        with pair.reader._listener.links[pair.lane.name]._claiming:
            held.clear()
        return digest(ticket)

    monkeypatch.setattr(link, "digest", digest_and_collect)
    assert same(pair.reader.take(ticket), random((8,)))
    assert pair.nothing_is_out()


def test_a_release_that_was_interrupted_is_sent_with_the_next(
    pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler that raised: what a finalizer raises goes nowhere."""
    one, two = pair.reader.take(pair.put(random(SHAPE))), pair.reader.take(pair.put(random((7,))))
    swallowed: list[str] = []

    def probe(name: str) -> None:
        if name == "release.queued":
            failpoints.probe = None
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", lambda hook: swallowed.append(hook.exc_type.__name__))
    monkeypatch.setattr(failpoints, "probe", probe)
    del one
    assert swallowed == ["KeyboardInterrupt"] and pair.lane.stats().tickets == 2
    del two
    eventually(pair.nothing_is_out, "both are released")
    assert pair.lane.stats().malformed_messages == 0
