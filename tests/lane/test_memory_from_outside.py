"""What other programs see of a lane's memory: core dumps, other users, the process's own limit on mappings."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmlane import host
from mmlane.lane import cuda, mapping
from tests.lane.harness import kernel
from tests.lane.harness.fake_cuda import FakeGpu
from tests.lane.harness.lane_with_readers import SEGMENT, LaneWithReaders, backing, copy, lane_with_readers
from tests.lane.harness.payloads import MODES, random, same
from tests.lane.harness.waiting import DEADLINE, eventually


def test_a_python_without_memfd_create_has_memory_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built on an old C library, on a kernel that has the call: conda's, uv's until 2026."""
    for name in ("memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING"):
        monkeypatch.delattr(os, name)
    for name in ("F_ADD_SEALS", "F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW"):
        monkeypatch.delattr(fcntl, name)
    with lane_with_readers() as pair:
        assert pair.lane.stats().degraded == ()
        assert str(Path(f"/proc/self/fd/{backing(pair.lane).fd}").readlink()).startswith("/memfd:mmlane")
        tensor = random((SEGMENT,))
        assert same(pair.reader.take(pair.put(tensor)), tensor)


def test_no_other_user_may_open_the_memory(pair: LaneWithReaders) -> None:
    """A memfd is born with mode 0777."""
    found = backing(pair.lane)
    assert [os.fstat(fd).st_mode & 0o777 for fd in (found.fd, found.shared_fd)] == [0o600, 0o600]


def flags() -> dict[str, set[str]]:
    """By place, the kernel's flags of this process's mappings of lanes."""
    found: dict[str, set[str]] = {}
    place = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            place = name if "/memfd:mmlane" in line else ""
        elif name == "VmFlags:" and place:
            found[place] = set(rest)
    return found


def test_no_mapping_of_a_lane_is_in_a_core_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read all of a sparse file, and so commit its whole capacity."""
    monkeypatch.setattr(cuda, "Cuda", FakeGpu())
    others = flags().keys()  # of lanes that other tests' fixtures keep
    with lane_with_readers(device="cuda:0", pinned=SEGMENT) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        held = [pair.reader.take(pair.put(random((SEGMENT,))), mode) for mode in MODES]
        found = {place: each for place, each in flags().items() if place not in others}
        assert len(found) == 4, "the producer's, the reader's, what is pinned, and one to edit"
        assert all("dd" in each for each in found.values()), found
        del held


# --- mappings ----------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many private mappings this process may have now."""
    monkeypatch.setattr(host, "max_map_count", lambda: 40)
    mapping._max_private.cache_clear()
    yield 10
    mapping._max_private.cache_clear()


def test_cow_takes_a_quarter_of_the_mappings_and_clones_then(wide: LaneWithReaders, few: int) -> None:
    """The rest is for the process: its threads, its libraries, its allocator."""
    before = kernel.mappings(os.getpid())
    for _ in range(2):
        held = [wide.reader.take(wide.put(random((100,), seed=seed)), "cow") for seed in range(few + 5)]
        assert wide.lane.stats().tickets == few, "a clone is released at once"
        assert kernel.mappings(os.getpid()) <= before + few + 5, "the allocator has some"
        for seed, tensor in enumerate(held):
            assert same(tensor, random((100,), seed=seed))
            tensor += 1
            assert same(tensor, random((100,), seed=seed) + 1)
        del held, tensor
        assert wide.nothing_is_out()


def test_many_tensors_to_edit_leave_the_process_room_for_mappings() -> None:
    """The kernel's own count, with the real limit."""
    limit = host.max_map_count()
    if limit is None or limit > 1 << 17:
        pytest.skip(f"vm.max_map_count is {limit} here: that many take too long")
    count = limit // 4 + 100
    tensor = random((100,))
    with lane_with_readers() as pair:
        before = kernel.mappings(os.getpid())
        with copy(pair.lane, tensor) as room:
            tickets = [room.publish() for _ in range(count)]
        held = [pair.reader.take(ticket, "cow") for ticket in tickets if isinstance(ticket, bytes)]
        assert len(held) == count
        assert kernel.mappings(os.getpid()) < before + limit // 4 + 100
        assert pair.lane.stats().tickets == limit // 4
        thread = threading.Thread(target=lambda: torch.empty(64 << 20, dtype=torch.uint8))  # both need a mapping
        thread.start()
        thread.join(DEADLINE)
        held.clear()
        eventually(lambda: kernel.mappings(os.getpid()) < before + 100, "they are unmapped")
        pair.wait_until_nothing_is_out()
