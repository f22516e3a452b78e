"""Mappings and descriptors of a reader: none is leaked, and where no mapping can be had the tensor is copied."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from mmlane.lane import mapping
from tests.lane.harness.child import run
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, lane_with_readers, published
from tests.lane.harness.payloads import MODES, random
from tests.lane.harness.programs import run_beside_a_lane


def mappings_and_descriptors() -> tuple[int, int]:
    process = Path("/proc/self")
    return (process / "maps").read_text().count("mmlane"), len(list((process / "fd").iterdir()))


def take_many() -> tuple[tuple[int, int], ...]:
    """What there is before, while many are held, and after them; where no other test has left anything to end."""
    with lane_with_readers() as pair:
        tensor = random((3 * PAGE,))
        pair.reader.take(pair.put(tensor), "cow")
        before = mappings_and_descriptors()
        with pair.copy(tensor) as copy:
            held = [pair.reader.take(published(copy), "cow") for _ in range(300)]
        amid = mappings_and_descriptors()
        held.clear()
        for mode in MODES * 100:
            pair.reader.take(pair.put(tensor), mode)
        return before, amid, mappings_and_descriptors()


def test_no_mapping_and_no_descriptor_is_left_by_many_takes() -> None:
    before, amid, after = run(take_many)
    assert before == after and before[0] < amid[0]


def test_where_no_private_mapping_can_be_had_cow_is_a_copy() -> None:
    """A process may have so many mappings and no more: the reader gets a tensor to write to all the same."""
    ended = run_beside_a_lane(
        """
        import mmap
        reader, other = pair.readers
        tensor = random((3 * PAGE,))
        one, two = pair.put(tensor), pair.put(tensor)
        for ticket in (one, two):
            other.discard(ticket)
        limit = int(open("/proc/sys/vm/max_map_count").read())
        mappings = []
        try:
            while len(mappings) <= limit:  # alternately, lest the kernel joins them
                mappings.append(mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | len(mappings) % 2 * mmap.PROT_WRITE))
        except OSError as error:
            print(error.strerror)
        copy = reader.take(one, "cow")
        assert pair.lane.stats().tickets == 1
        copy.fill_(3)
        del mappings
        cow = reader.take(two, "cow")
        assert pair.lane.stats().tickets == 1
        assert same(cow, tensor) and int(copy.sum()) == 9 * PAGE
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "Cannot allocate memory\n", "")


def test_cow_leaves_the_process_most_of_the_mappings_that_it_may_have(
    wide: LaneWithReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none is left, malloc and dlopen fail: so cow is a copy from a quarter of them on."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert mapping._max_private() == limit // 4
    others = len(mapping.Mapping._private)
    monkeypatch.setattr(mapping, "_max_private", lambda: others + 2)
    tensor = random((3 * PAGE,))
    held = [wide.reader.take(wide.put(tensor), "cow") for _ in range(2)]
    clone = wide.reader.take(wide.put(tensor), "cow")
    assert wide.lane.stats().tickets == 2
    clone.fill_(3)
    held.pop()
    held.append(wide.reader.take(wide.put(tensor), "cow"))
    assert wide.lane.stats().tickets == 2
    assert all(torch.equal(taken, tensor) for taken in held)
    held.clear()
    assert len(mapping.Mapping._private) == others


def test_a_view_is_where_the_mapping_is_and_costs_no_memory(pair: LaneWithReaders) -> None:
    ticket = pair.put(random((2 * SEGMENT,)))
    one = pair.reader.take(ticket, "view")
    whole = pair.reader._listener.links[pair.lane.name].mapping
    assert 0 <= one.data_ptr() - whole.address < whole.nbytes
    assert one.data_ptr() % PAGE == 0
    assert ctypes.string_at(one.data_ptr(), 4) == bytes(one[:4].tolist())
    del one
