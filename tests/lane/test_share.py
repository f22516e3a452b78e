"""The puts of a share are one copy, until its uses are spent or it ends.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlane.lane import Lane, Share, failpoints
from mmlane.lane.bookkeeping import Hold
from tests.lane.harness.payloads import random, same
from tests.lane.harness.together import PAGE, Together, held, offset, together
from tests.lane.harness.waiting import DEADLINE, eventually
from tests.lane.writes import SMALL, WRITES


@pytest.mark.parametrize("uses", [1, 2, 3, 9])
def test_a_share_is_one_copy_for_its_uses(wide: Together, uses: int) -> None:
    tensor, share = random((3 * PAGE,)), wide.lane.share(uses)
    tickets = [wide.put(tensor, share=share) for _ in range(uses)]
    assert len(set(tickets)) == uses and len({offset(ticket) for ticket in tickets}) == 1
    stats = wide.lane.stats()
    assert held(stats) == (uses, 1, 3)
    assert (stats.puts, stats.shared, stats.copied_bytes) == (uses, uses - 1, 3 * PAGE)
    views = [wide.reader.take(ticket, "view") for ticket in tickets]
    assert all(same(view, tensor) for view in views) and len({view.data_ptr() for view in views}) == 1
    while views:
        assert held(wide.lane.stats()) == (len(views), 1, 3)
        views.pop()
    assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("uses", [0, -1])
def test_a_share_for_no_put_is_an_error(wide: Together, uses: int) -> None:
    with pytest.raises(ValueError, match=f"{uses=}.*at least one"):
        wide.lane.share(uses)


def test_the_copy_of_a_share_outlives_all_its_tickets(wide: Together) -> None:
    """A request waits for an answer to its first ticket before it sends the others."""
    tensor, share = random((PAGE,)), wide.lane.share(uses=4)
    offsets = set()
    for left in (3, 2, 1, 0):
        ticket = wide.put(tensor, share=share)
        offsets.add(offset(ticket))
        taken = wide.reader.take(ticket)
        assert same(taken, tensor) and held(wide.lane.stats()) == (1, 1, 1)
        del taken
        assert held(wide.lane.stats()) == ((0, 1, 1) if left else (0, 0, 0))
        wide.discard(wide.put(random((PAGE,), seed=left + 1)))  # never there
    assert len(offsets) == 1 and wide.lane.stats().copied_bytes == 5 * PAGE


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_all_tickets_of_a_share_say_what_was_put_first(large: Together, write: Callable[[Tensor], object]) -> None:
    """One request has one picture, also if its caller has the next one in the same memory already."""
    tensor = torch.arange(24.0).view(SMALL)
    before = tensor.clone()
    share = large.lane.share(uses=3)
    first = large.put(tensor, share=share)
    write(tensor)
    tickets = [first, large.put(tensor, share=share), large.put(before, share=share)]
    assert all(same(large.reader.take(ticket), before) for ticket in tickets)
    assert same(large.reader.take(large.put(tensor, share=share)), tensor)  # beyond the uses
    assert large.nothing_is_out()


def by_closing(share: list[Share]) -> None:
    share[0].close()


def by_closing_twice(share: list[Share]) -> None:
    share[0].close()
    share[0].close()


def by_leaving(share: list[Share]) -> None:
    with share[0]:
        pass


def by_an_error(share: list[Share]) -> None:
    with pytest.raises(KeyError), share[0]:
        raise KeyError


def by_dropping(share: list[Share]) -> None:
    share.clear()


def by_dropping_in_a_cycle(share: list[Share]) -> None:
    cycle: list[Any] = [share.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()


def by_dropping_elsewhere(share: list[Share]) -> None:
    thread = threading.Thread(target=share.clear)
    thread.start()
    thread.join()


ENDS = [
    by_closing,
    by_closing_twice,
    by_leaving,
    by_an_error,
    by_dropping,
    by_dropping_in_a_cycle,
    by_dropping_elsewhere,
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("puts", [0, 1, 2])
@pytest.mark.parametrize("first", ["share", "tickets"])
def test_a_share_that_ends_before_its_uses_are_spent(
    wide: Together, end: Callable[[list[Share]], None], puts: int, first: str
) -> None:
    """Its copy is free with the last ticket, or at once if there is none."""
    tensor, share = random((PAGE,)), [wide.lane.share(uses=3)]
    tickets = [wide.put(tensor, share=share[0]) for _ in range(puts)]
    if first == "tickets":
        while tickets:
            wide.discard(tickets.pop())
        assert held(wide.lane.stats()) == (0, bool(puts), bool(puts))
    end(share)
    while tickets:
        assert held(wide.lane.stats()) == (len(tickets), 1, 1)
        assert same(wide.reader.take(tickets.pop()), tensor)
    assert held(wide.lane.stats()) == (0, 0, 0)


def test_a_share_whose_making_was_interrupted_ends_without_a_word() -> None:
    Share.__new__(Share).close()


def test_a_put_with_a_closed_share_copies(wide: Together) -> None:
    tensor, share = random((PAGE,)), wide.lane.share(uses=5)
    first = wide.put(tensor, share=share)
    share.close()  # and no drain between this and the next put
    tensor.add_(1)
    second, third = wide.put(tensor, share=share), wide.put(random((3,)), share=share)  # nor is it of its kind
    assert len({offset(ticket) for ticket in (first, second, third)}) == 3
    wide.discard(first)
    assert held(wide.lane.stats()) == (2, 2, 2)
    assert same(wide.reader.take(second), tensor) and same(wide.reader.take(third), random((3,)))


def test_a_put_beyond_the_uses_copies(wide: Together) -> None:
    tensor, share = random((PAGE,)), wide.lane.share(uses=2)
    tickets = [wide.put(tensor, share=share) for _ in range(2)]
    tensor.add_(1)
    tickets += [wide.put(tensor, share=share) for _ in range(2)]
    assert len({offset(ticket) for ticket in tickets}) == 3
    assert held(wide.lane.stats()) == (4, 3, 3)
    for number, ticket in enumerate(tickets):
        assert same(wide.reader.take(ticket), tensor if number > 1 else tensor - 1)


def test_a_share_of_another_lane_is_an_error(wide: Together) -> None:
    with together() as other:
        share = other.lane.share(uses=2)
        ticket = other.put(random((5,)), share=share)
        for what in (random((5,)), "not even a tensor"):
            with pytest.raises(ValueError, match=f"{other.lane.name}.*{wide.lane.name}"):
                wide.lane.put(what, share=share)  # type: ignore[arg-type]
        assert held(wide.lane.stats()) == (0, 0, 0) and held(other.lane.stats()) == (1, 1, 1)
        assert offset(other.put(random((5,)), share=share)) == offset(ticket)  # no use was spent
        other.lane.withdraw(ticket)


OTHERS = {
    "shape": random((6, 2), torch.float32),
    "fewer": random((11,), torch.float32),
    "more": random((1 << 20,), torch.float32),
    "one more dimension": random((1, 12), torch.float32),
    "dtype": random((12,), torch.int32),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_share_for_another_tensor_is_an_error(wide: Together, other: Tensor) -> None:
    tensor, share = random((12,), torch.float32), wide.lane.share(uses=3)
    tickets = [wide.put(tensor, share=share)]
    with pytest.raises(ValueError, match=r"torch.float32.*12"):
        wide.lane.put(other, share=share)
    assert wide.lane.is_open and held(wide.lane.stats()) == (1, 1, 1)
    tickets += [wide.put(tensor, share=share) for _ in range(2)]  # no use was spent
    assert wide.lane.stats().shared == 2
    for ticket in tickets:
        assert same(wide.reader.take(ticket), tensor)


def test_tensors_of_other_sizes_at_the_same_time_are_copied_or_an_error(
    wide: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a ticket for more bytes than there are: what is looked at and what is done is one step."""
    small, big, share = random((10,)), random((5 * PAGE,)), wide.lane.share(uses=4)
    inner: list[bytes] = []

    def probe(name: str) -> None:
        if name == "put.copied" and not inner:
            inner.append(b"")
            inner.append(wide.put(big, share=share))

    monkeypatch.setattr(failpoints, "probe", probe)
    outer = wide.put(small, share=share)
    monkeypatch.setattr(failpoints, "probe", None)
    with pytest.raises(ValueError, match="a share for"):
        wide.lane.put(small, share=share)
    assert same(wide.reader.take(inner[1]), big) and same(wide.reader.take(outer), small)


def stands_in(thread: threading.Thread, code: CodeType) -> bool:
    """Whether a thread is in a function itself, at one place for a while."""
    seen = set()
    for _ in range(50):
        frame = sys._current_frames().get(thread.ident or 0)
        seen.add(None if frame is None or frame.f_code is not code else frame.f_lasti)
        time.sleep(0.001)
    return None not in seen and len(seen) == 1


def test_what_a_share_is_for_is_looked_at_with_the_lock_held(wide: Together) -> None:
    """A put that waits for the lock learns of what is put meanwhile: no ticket for more bytes than there are."""
    share, lane = wide.lane.share(uses=5), wide.lane
    errors: list[str] = []

    def work() -> None:
        with pytest.raises(ValueError) as error:
            lane.put(random((5 * PAGE,)), share=share)
        errors.append(str(error.value))
        del error  # with the frame that has the share

    thread = threading.Thread(target=work)
    with lane.lock:
        thread.start()
        eventually(lambda: stands_in(thread, Lane.put.__code__), "it waits for the lock")
        shared, small, hold = share.shared, random((10,)), Hold()
        assert shared is not None
        extent = lane._tickets.allocate(0, 10, hold)
        shared.content = small.dtype, small.shape
        lane._tickets.keep(extent, shared)
        del shared
        ticket = lane._issue(small, extent, 0)
        lane._tickets.let_go(hold)
    thread.join(DEADLINE)
    assert len(errors) == 1 and isinstance(ticket, bytes)
    lane.withdraw(ticket)
    share.close()
