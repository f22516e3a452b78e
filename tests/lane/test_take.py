"""Taking and letting go, in one process: what can be done with a tensor, and when its ticket is released.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mmlane.lane import Mode, Refused, UnknownLane
from mmlane.lane.ticket import read
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, lane_with_readers, published
from tests.lane.harness.payloads import MODES, SHAPE, random, same
from tests.lane.harness.programs import run_beside_a_lane

# --- modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), SHAPE], ids=str)
def test_every_mode_gives_the_tensor_and_the_ticket_ends_with_it(
    pair: LaneWithReaders, mode: Mode, shape: tuple[int, ...]
) -> None:
    tensor = random(shape, torch.float32)
    taken = pair.reader.take(pair.put(tensor), mode)
    assert same(taken, tensor) and taken.is_contiguous() and not taken.requires_grad
    assert pair.lane.stats().tickets == (0 if mode == "clone" or tensor.numel() == 0 else 1)
    assert taken.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
    del taken
    assert pair.lane.stats().tickets == 0


@pytest.mark.parametrize("mode", ["cow", "clone"])
def test_no_other_tensor_shows_what_a_reader_writes(mode: Mode) -> None:
    """(6)"""
    with lane_with_readers(readers=2) as pair:
        tensor = random(SHAPE, torch.float32)
        before = tensor.clone()
        copy = pair.copy(tensor)
        first, second, third = (published(copy) for _ in range(3))
        view, other = pair.readers[1].take(first), pair.readers[1].take(second, "cow")
        mine = pair.readers[0].take(first, mode)
        mine.fill_(7)
        mine[0, 0] = 8
        assert float(mine.sum()) == 7 * 3000 + 1
        others = [pair.readers[0].take(second), pair.readers[1].take(third, "clone")]
        for seen in (view, other, tensor, copy.tensor, *others):
            assert same(seen, before)
        other.zero_()
        assert same(view, before) and same(copy.tensor, before) and float(mine.sum()) == 7 * 3000 + 1
        assert same(pair.readers[0].take(third), before)
        del view, other, others, mine, seen
        copy.close()


def test_a_page_that_is_not_written_is_not_copied(pair: LaneWithReaders) -> None:
    """The others are the lane's own, as one can see when something is written there."""
    tensor = torch.zeros(3 * PAGE, dtype=torch.uint8)
    ticket = pair.put(tensor)
    content = read(ticket)
    taken = pair.reader.take(ticket, "cow")
    taken[PAGE] = 1
    memory = pair.lane._committer.memory
    assert memory is not None
    producer = torch.frombuffer(
        memory.mapping.owner(pair.lane._committer.base + content.offset), dtype=torch.uint8, count=3 * PAGE
    )
    producer.fill_(9)
    assert taken[0] == 9 and taken[2 * PAGE] == 9
    assert taken[PAGE] == 1 and taken[PAGE + 1] == 0
    del taken, producer


def test_writing_to_a_view_ends_the_process() -> None:
    """With a signal, rather than with changed bytes in every reader (6)."""
    ended = run_beside_a_lane(
        """
        tensor = random((10,))
        one, two = (reader.take(ticket, "view") for ticket in [pair.put(tensor)] for reader in pair.readers)
        assert same(one, tensor)
        print("read", flush=True)
        one[3] = 1
        print("written", flush=True)
        """
    )
    assert ended.stdout == "read\n" and ended.returncode == -11, (ended.returncode, ended.stderr)


def test_an_unknown_mode_is_an_error_and_the_ticket_can_still_be_taken(pair: LaneWithReaders) -> None:
    tensor = random((5,))
    ticket = pair.put(tensor)
    for mode in ("copy", "", "View", 1):
        with pytest.raises(ValueError, match="one of view, cow, clone"):
            pair.reader.take(ticket, mode)  # type: ignore[arg-type]
    assert same(pair.reader.take(ticket), tensor)


# --- how long a ticket is out ------------------------------------------------------------------------------


class _Holder:
    """Something that a weak reference can be made to."""

    def __init__(self, held: object) -> None:
        self.held = held


ALIASES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "slice": lambda tensor: tensor[1:2, 5:6],
    "element": lambda tensor: tensor[2, 999],
    "view": lambda tensor: tensor.view(-1),
    "transposed": lambda tensor: tensor.T,
    "detached": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "alias": lambda tensor: torch.ops.aten.alias(tensor),
    "of another dtype": lambda tensor: tensor.view(torch.int16),
    "view of a view": lambda tensor: tensor[1:].view(torch.uint8)[:, ::3].T[7:],
    "empty slice": lambda tensor: tensor[:0],
    "expanded": lambda tensor: tensor[None].expand(5, *SHAPE),
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
    "chunks": lambda tensor: tensor.unbind(0)[1:2],
    "storage": lambda tensor: tensor.untyped_storage(),
    "typed storage": lambda tensor: tensor.storage(),  # type: ignore[no-untyped-call]
    "set from storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "graph": lambda tensor: (torch.ones(SHAPE, requires_grad=True) * tensor).sum(),
    "array": lambda tensor: tensor.numpy(),
    "part of an array": lambda tensor: tensor.numpy()[1:, ::7].T,
    "tensor of an array": lambda tensor: torch.from_numpy(tensor.numpy()[1:, ::7]),
    "dlpack capsule": lambda tensor: tensor.__dlpack__(),
    "tensor from dlpack": lambda tensor: torch.utils.dlpack.from_dlpack(tensor.__dlpack__())[1:],
    "array from dlpack": lambda tensor: numpy.from_dlpack(tensor)[1:],
    "cell": lambda tensor: lambda: tensor,
    "bound method": lambda tensor: tensor.add_,
    "iterator": lambda tensor: iter(tensor.unbind(0)),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("mode", ["view", "cow"])
@pytest.mark.parametrize("made", ALIASES.values(), ids=ALIASES)
def test_a_ticket_is_out_as_long_as_any_alias_lives(
    pair: LaneWithReaders, made: Callable[[Tensor], object], mode: Mode
) -> None:
    """(2)"""
    tensor = random(SHAPE, torch.float32)
    taken: Any = pair.reader.take(pair.put(tensor), mode)
    held = _Holder(made(taken))
    assert pair.lane.stats().tickets == 1
    del taken
    gc.collect()
    assert pair.lane.stats().tickets == 1
    tensor.add_(1)
    for _ in range(20):  # whatever else happens in the lane
        pair.discard(pair.put(tensor))
    assert pair.lane.stats().tickets == 1
    del held
    assert pair.lane.stats().tickets == 0  # at once: by reference counts, not by the collector
    assert pair.lane.stats().malformed_messages == 0


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_an_alias_reads_the_same_bytes_to_the_end(pair: LaneWithReaders, mode: Mode) -> None:
    """(2): while the producer goes on filling the lane."""
    tensor = random((2 * SEGMENT,))
    taken = pair.reader.take(pair.put(tensor), mode)
    part = taken[SEGMENT:].view(-1, 16).T
    del taken
    for number in range(60):
        ticket = pair.put(torch.full((5 * SEGMENT,), number, dtype=torch.uint8))
        pair.discard(ticket)
        assert same(part, tensor[SEGMENT:].view(-1, 16).T)
    refused = pair.lane.put(torch.zeros(15 * SEGMENT, dtype=torch.uint8))
    assert isinstance(refused, Refused) and refused.cause == "full"
    del part
    pair.discard(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_a_tensor_in_a_reference_cycle_is_released_when_it_is_collected(pair: LaneWithReaders, mode: Mode) -> None:
    gc.disable()
    try:
        cycle: list[Any] = [pair.reader.take(pair.put(random(SHAPE)), mode)]
        cycle.append(cycle)
        del cycle
        assert pair.lane.stats().tickets == 1
        gc.collect()
        assert pair.lane.stats().tickets == 0
    finally:
        gc.enable()


def test_each_ticket_on_one_extent_is_released_alone(pair: LaneWithReaders) -> None:
    tensor = random(SHAPE)
    with pair.copy(tensor) as copy:
        held = [pair.reader.take(published(copy)) for _ in range(5)]
    for left in (4, 3, 2, 1, 0):
        del held[left // 2]
        assert pair.lane.stats().tickets == left
        assert all(same(taken, tensor) for taken in held)


def test_a_ticket_is_out_until_every_reader_has_released_it() -> None:
    """(2)"""
    with lane_with_readers(readers=3) as pair:
        ticket = pair.put(random(SHAPE))
        held = [reader.take(ticket) for reader in pair.readers[:2]]
        held.pop()
        assert pair.lane.stats().tickets == 1
        pair.readers[2].take(ticket)
        assert pair.lane.stats().tickets == 1 and same(held[0], random(SHAPE))
        held.pop()
        stats = pair.lane.stats()
        assert (stats.tickets, stats.used_bytes) == (0, 0)


def test_discarding_releases_a_ticket_untaken(pair: LaneWithReaders) -> None:
    pair.discard(pair.put(random(SHAPE)))
    stats = pair.lane.stats()
    assert (stats.tickets, stats.used_bytes, stats.lost_tickets) == (0, 0, 0)


def test_a_reader_knows_how_much_it_holds() -> None:
    with lane_with_readers() as pair:
        whole = pair.lane.stats().capacity_bytes
        assert pair.reader.held_share(pair.lane.name) == 0
        first, second = (pair.reader.take(pair.put(random((PAGE,), torch.float32))) for _ in range(2))
        view = first[1:]
        assert pair.reader.held_share(pair.lane.name) == 2 * 4 * PAGE / whole
        del first, second
        assert pair.reader.held_share(pair.lane.name) == 4 * PAGE / whole
        del view
        assert pair.reader.held_share(pair.lane.name) == 0
        with pytest.raises(UnknownLane):
            pair.reader.held_share("mmlane-that-is-not-joined")
