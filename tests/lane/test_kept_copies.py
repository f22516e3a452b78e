"""A copy that is kept: one copy for all its tickets, until its reservation has ended.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlane.lane import LaneError, Reservation
from tests.lane.harness.lane_with_readers import PAGE, LaneWithReaders, held, offset, published
from tests.lane.harness.payloads import random, same
from tests.lane.harness.programs import run_beside_a_lane
from tests.lane.ways_to_write import SMALL, WRITES


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_all_tickets_are_for_one_copy(wide: LaneWithReaders, count: int) -> None:
    tensor = random((3 * PAGE,))
    copy = wide.copy(tensor)
    stats = wide.lane.stats()
    assert held(stats) == (0, 1, 3) and (stats.puts, stats.shared, stats.copied_bytes) == (0, 0, 3 * PAGE)
    tickets = [published(copy) for _ in range(count)]
    assert len(set(tickets)) == count and len({offset(ticket) for ticket in tickets}) == 1
    stats = wide.lane.stats()
    assert held(stats) == (count, 1, 3)
    assert (stats.puts, stats.shared, stats.copied_bytes) == (count, count - 1, 3 * PAGE)
    copy.close()
    views = [wide.reader.take(ticket, "view") for ticket in tickets]
    assert all(same(view, tensor) for view in views) and len({view.data_ptr() for view in views}) == 1
    while views:
        assert held(wide.lane.stats()) == (len(views), 1, 3)
        views.pop()
    assert held(wide.lane.stats()) == (0, 0, 0)


def test_shared_counts_tickets_for_what_had_a_ticket_before(wide: LaneWithReaders) -> None:
    """Of a put and of another copy it says nothing, whatever they are of, and wherever they lie."""
    tensor = random((PAGE,))
    assert (wide.lane.stats().puts, wide.lane.stats().shared) == (0, 0)
    first = wide.put(tensor)
    wide.discard(first)
    second = wide.put(tensor)
    assert offset(second) == offset(first)
    copies = [wide.copy(tensor) for _ in range(3)]
    tickets = [published(copy) for copy in copies]
    assert len({offset(ticket) for ticket in tickets}) == 3
    assert (wide.lane.stats().puts, wide.lane.stats().shared) == (5, 0)
    wide.discard(tickets[0])
    tickets += [published(copies[0]), published(copies[1])]  # whose first ticket has ended; is out
    assert (wide.lane.stats().puts, wide.lane.stats().shared) == (7, 2)
    for ticket in (second, *tickets):
        wide.lane.withdraw(ticket)
    copies.clear()


def test_a_copy_outlives_all_its_tickets(wide: LaneWithReaders) -> None:
    """A request waits for an answer to its first ticket before it sends the others."""
    tensor = random((PAGE,))
    with wide.copy(tensor) as copy:
        offsets = set()
        for turn in range(4):
            ticket = published(copy)
            offsets.add(offset(ticket))
            taken = wide.reader.take(ticket)
            assert same(taken, tensor) and held(wide.lane.stats()) == (1, 1, 1)
            del taken
            assert held(wide.lane.stats()) == (0, 1, 1)
            wide.discard(wide.put(random((PAGE,), seed=turn + 1)))  # never there
        assert len(offsets) == 1 and wide.lane.stats().copied_bytes == 5 * PAGE
    assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_all_tickets_carry_what_was_copied(large: LaneWithReaders, write: Callable[[Tensor], object]) -> None:
    """One request has one picture, also if its caller has the next one in the same memory already (6)."""
    tensor = torch.arange(24.0).view(SMALL)
    before = tensor.clone()
    copy = large.copy(tensor)
    first = published(copy)
    write(tensor)
    tickets = [first, published(copy), published(copy)]
    assert not same(tensor, before) and same(copy.tensor, before)
    assert all(same(large.reader.take(ticket), before) for ticket in tickets)
    with large.copy(tensor) as another:
        assert same(large.reader.take(published(another)), tensor)
    copy.close()
    assert large.nothing_is_out()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 5)], ids=str)
def test_a_copy_without_elements_is_kept_like_any(wide: LaneWithReaders, shape: tuple[int, ...]) -> None:
    tensor = random(shape, torch.float32)
    copy = wide.copy(tensor)
    assert same(copy.tensor, tensor) and held(wide.lane.stats()) == (0, 1, 1)
    for _ in range(2):
        assert same(wide.reader.take(published(copy)), tensor) and held(wide.lane.stats()) == (0, 1, 1)
    copy.close()
    assert held(wide.lane.stats()) == (0, 0, 0)


# --- the end of a reservation ------------------------------------------------------------------------------


def by_closing(copies: list[Reservation]) -> None:
    copies[0].close()


def by_closing_twice(copies: list[Reservation]) -> None:
    copies[0].close()
    copies[0].close()


def by_closing_elsewhere(copies: list[Reservation]) -> None:
    thread = threading.Thread(target=copies[0].close)
    thread.start()
    thread.join()


def by_leaving(copies: list[Reservation]) -> None:
    with copies[0] as copy:
        assert copy is copies[0]


def by_an_error(copies: list[Reservation]) -> None:
    with pytest.raises(KeyError), copies[0]:
        raise KeyError


def by_dropping(copies: list[Reservation]) -> None:
    copies.clear()


def by_dropping_in_a_cycle(copies: list[Reservation]) -> None:
    cycle: list[Any] = [copies.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()


def by_dropping_elsewhere(copies: list[Reservation]) -> None:
    thread = threading.Thread(target=copies.clear)
    thread.start()
    thread.join()


ENDS = [
    by_closing,
    by_closing_twice,
    by_closing_elsewhere,
    by_leaving,
    by_an_error,
    by_dropping,
    by_dropping_in_a_cycle,
    by_dropping_elsewhere,
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("first", ["copy", "tickets"])
def test_a_copy_is_free_with_its_reservation_and_its_last_ticket(
    wide: LaneWithReaders, end: Callable[[list[Reservation]], None], count: int, first: str
) -> None:
    """At once if there is no ticket."""
    tensor = random((PAGE,))
    copies = [wide.copy(tensor)]
    tickets = [published(copies[0]) for _ in range(count)]
    if first == "tickets":
        while tickets:
            wide.discard(tickets.pop())
        assert held(wide.lane.stats()) == (0, 1, 1)
    end(copies)
    while tickets:
        assert held(wide.lane.stats()) == (len(tickets), 1, 1)
        assert same(wide.reader.take(tickets.pop()), tensor)
    assert held(wide.lane.stats()) == (0, 0, 0)


ALIASES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "a slice": lambda tensor: tensor[5:7],
    "detached": lambda tensor: tensor.detach(),
    "of another dtype": lambda tensor: tensor.view(torch.int16),
    "its storage": lambda tensor: tensor.untyped_storage(),
    "an array": lambda tensor: tensor.numpy()[1:],
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
}


@pytest.mark.parametrize("made", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("end", [by_closing, by_dropping])
def test_a_copy_is_kept_as_long_as_an_alias_of_its_tensor_lives(
    wide: LaneWithReaders, made: Callable[[Tensor], object], end: Callable[[list[Reservation]], None]
) -> None:
    """(2): it is not used again, so that what the alias writes is in no reader's tensor (6)."""
    copies = [wide.copy(random((PAGE,)))]
    alias = [made(copies[0].tensor)]
    end(copies)
    assert held(wide.lane.stats()) == (0, 1, 1)
    ticket = wide.put(random((PAGE,), seed=1))
    assert held(wide.lane.stats()) == (1, 2, 2)
    alias.clear()
    assert held(wide.lane.stats()) == (1, 1, 1)
    wide.discard(ticket)


@pytest.mark.parametrize("end", [by_closing, by_closing_twice, by_leaving, by_an_error])
@pytest.mark.parametrize("out", [False, True])
def test_what_is_closed_cannot_be_published(
    wide: LaneWithReaders, end: Callable[[list[Reservation]], None], out: bool
) -> None:
    """Also if its bytes are still there, for a ticket of before or an alias."""
    tensor = random((PAGE,))
    copy = wide.copy(tensor)
    ticket = published(copy)
    alias = copy.tensor
    if not out:
        del alias
        wide.discard(ticket)
    end([copy])
    before = wide.figures()
    for _ in range(2):
        with pytest.raises(LaneError, match="closed"):
            copy.publish()
        with pytest.raises(LaneError, match="closed"):
            copy.publish(tensor)
        with pytest.raises(LaneError, match="closed"):
            _ = copy.tensor
    assert wide.figures() == before and wide.lane.is_open
    assert held(wide.lane.stats()) == ((1, 1, 1) if out else (0, 0, 0))
    if out:
        assert same(wide.reader.take(ticket), tensor)


HELD_AT_THE_END = """
    tensor = random((3 * PAGE,))
    kept = pair.copy(tensor)
    closed = pair.copy(tensor)
    closed.close()
    cycle = [pair.copy(tensor)]
    cycle.append(cycle)
    alias = pair.copy(tensor).tensor
    tickets = [kept.publish(), cycle[0].publish()]
    taken = pair.reader.take(tickets[0])
    if ENDED:
        pair.lane.close()
    print("well")
"""


@pytest.mark.parametrize("ended", [False, True])
def test_a_program_ends_without_output_while_copies_are_kept(ended: bool) -> None:
    program = run_beside_a_lane(HELD_AT_THE_END.replace("ENDED", str(ended)))
    assert (program.returncode, program.stdout, program.stderr) == (0, "well\n", "")
