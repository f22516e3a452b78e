"""Where memory runs out, of a control group, the machine or a file system: a refusal, never a killed process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mmlane import host
from mmlane.lane import Invitation, Lane, Reader, Refused, committing, failpoints, issuing, memory, producer
from tests.lane.harness.child import Child, Died, run
from tests.lane.harness.confinement import (
    Deny,
    Group,
    forbid,
    memory_group,
    mount_over,
    require_filters,
    require_mounts,
)
from tests.lane.harness.kernel import blocks
from tests.lane.harness.lane_with_readers import backing, put
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20
BASE = issuing.SLOTS * 8


@pytest.fixture
def group() -> Iterator[Group]:
    """A memory control group of 160 MiB."""
    with memory_group(160 * MIB) as group:
        yield group


def put_until_refused(lane: Lane, tensor: torch.Tensor) -> tuple[list[bytes], Refused]:
    """Tickets on copies of a tensor, as many as there can be, and why there are no more."""
    tickets: list[bytes] = []
    while isinstance(ticket := lane.put(tensor), bytes):
        tickets.append(ticket)
    return tickets, ticket


# --- memory control groups ---------------------------------------------------------------------------------


def produce_in_a_group(pipe: Connection, group: Group, threads: int) -> None:
    """Puts until there is no memory, again when the reader has let go, and again for as long as it is told to."""
    group.enter()
    tensor = torch.ones(8 * MIB, dtype=torch.uint8)
    with Lane({"tp": 1}, capacity=1 << 30) as lane:
        pipe.send(lane.invitation)
        assert lane.wait_open(DEADLINE)
        while pipe.recv():
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(partial(put_until_refused, lane), [tensor] * threads))
            left = host.memory().available
            pipe.send(
                ([ticket for tickets, _ in found for ticket in tickets], [refused for _, refused in found], left)
            )


@pytest.mark.parametrize("threads", [1, 4])
def test_a_put_in_a_full_control_group_is_refused_and_no_process_is_killed(group: Group, threads: int) -> None:
    with Child(produce_in_a_group, group, threads) as child, Reader("tp") as reader:
        reader.join(child.hear())
        for _ in range(3):
            child.say(True)
            tickets, refusals, left = child.hear()
            assert 10 <= len(tickets) < 20, "most of the memory is used"
            assert left >= 8 * MIB, "but for a sixteenth of it, which is 10 MiB"
            for refused in refusals:
                assert refused.cause == "full" and "no memory for 8388608 bytes" in refused.detail, refused
                assert "left for the lane" in refused.detail
            held = [reader.take(ticket) for ticket in tickets]
            assert all(tensor.all() for tensor in held)
            del held
        child.say(False)
        child.result()
        assert group.kills() == 0


def put_at_the_same_time(pipe: Connection, group: Group, nbytes: int) -> list[bool]:
    """Four puts that are all about to commit memory, of which there is enough for each, but not for all."""
    group.enter()
    tensor = torch.ones(1, dtype=torch.uint8).expand(nbytes)
    allocated = threading.Barrier(4)

    def probe(point: str) -> None:
        if point == "put.allocated":
            allocated.wait(DEADLINE)

    with Lane({"tp": 1}, capacity=1 << 30) as lane:
        pipe.send(lane.invitation)
        assert lane.wait_open(DEADLINE)
        failpoints.probe = probe
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lane.put, [tensor] * 4))
        return [isinstance(ticket, bytes) for ticket in found]


def test_puts_at_the_same_time_do_not_count_on_the_same_memory(group: Group) -> None:
    with Child(put_at_the_same_time, group, 48 * MIB) as child, Reader("tp") as reader:
        reader.join(child.hear())
        carried = child.result()
        assert any(carried) and not all(carried)
        assert group.kills() == 0


def commit_without_looking(group: Group) -> None:
    group.enter()
    memory.Backing(1 << 30).reserve(0, 320 * MIB)


def test_without_looking_first_a_control_group_kills(group: Group) -> None:
    """What the test above guards against does happen here."""
    with pytest.raises(Died) as death:
        run(commit_without_looking, group)
    assert death.value.exitcode == -9 and group.kills() == 1


def put_more_than_there_is(pipe: Connection, group: Group) -> tuple[str | bytes, int, int]:
    tensor = torch.zeros(200 * MIB, dtype=torch.uint8)  # never touched, so it takes no memory itself
    group.enter()
    with Lane({"tp": 1}, capacity=1 << 30) as lane:
        pipe.send(lane.invitation)
        assert lane.wait_open(DEADLINE)
        refused = lane.put(tensor)
        stats = lane.stats()
        put(lane, tensor[:MIB])
        return refused.cause if isinstance(refused, Refused) else refused, stats.committed_bytes, stats.used_bytes


def test_a_tensor_for_which_there_is_no_memory_commits_none(group: Group) -> None:
    with Child(put_more_than_there_is, group) as child, Reader("tp") as reader:
        reader.join(child.hear())
        cause, committed, used = child.result()
        assert (cause, used) == ("full", 0) and committed <= 2 * committing._AHEAD
        assert group.kills() == 0


def capacity_in_a_group(group: Group) -> tuple[int, int, int]:
    group.enter()
    with Lane({"tp": 1}) as lane:
        return memory.default_capacity(), lane.stats().capacity_bytes, host.memory().available


def test_the_default_capacity_follows_the_control_group(group: Group) -> None:
    default, capacity, available = run(capacity_in_a_group, group)
    assert default == capacity == 40 * MIB
    assert available <= 160 * MIB


def read_in_a_group(pipe: Connection, group: Group, invitation: Invitation) -> int:
    group.enter()
    with Reader("tp") as reader:
        reader.join(invitation)
        pipe.send("joined")
        tensor = reader.take(pipe.recv())
        assert tensor.sum() == tensor.numel()
        return group.used()


def test_readers_are_not_charged(group: Group) -> None:
    """More than a reader's control group may have can be read there."""
    with Lane({"tp": 1}, capacity=256 * MIB) as lane, Child(read_in_a_group, group, lane.invitation) as child:
        assert child.hear() == "joined" and lane.wait_open(DEADLINE)
        child.say(put(lane, torch.ones(50 * MIB)))
        assert child.result() < 64 * MIB


# --- memory of the machine ---------------------------------------------------------------------------------


def committed(lane: Lane) -> int:
    """Bytes of memory behind a lane, directory included, as the kernel counts."""
    return os.fstat(backing(lane).fd).st_blocks * 512


def test_nothing_is_committed_before_use() -> None:
    with Lane({"tp": 1}, capacity=64 << 30) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        stats = lane.stats()
        assert (stats.capacity_bytes, stats.committed_bytes, stats.used_bytes) == (64 << 30, 0, 0)
        assert blocks(backing(lane).fd) == BASE
        held = reader.take(put(lane, torch.ones(10)))
        eventually(
            lambda: blocks(backing(lane).fd) == BASE + lane.stats().committed_bytes,
            "it is as large as it says",
        )
        assert lane.stats().committed_bytes <= 3 * producer.SEGMENT, "one that was needed, and 8 MiB ahead"
        assert held.sum() == 10


def test_more_than_the_machine_has_is_address_room_only() -> None:
    """What cannot be had is refused when it is wanted, not before."""
    with Lane({"tp": 1}, capacity=1 << 40) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        refused = lane.put(torch.empty(1 << 39, dtype=torch.uint8, device="meta"))
        assert isinstance(refused, Refused) and refused.cause == "unsupported"
        there_is = host.memory().total
        refused = lane.put(torch.zeros(1, dtype=torch.uint8).expand(there_is))
        assert isinstance(refused, Refused) and refused.cause == "full", refused
        assert f"no memory for {there_is} bytes" in refused.detail
        assert lane.stats().used_bytes == 0 and blocks(backing(lane).fd) <= BASE + 2 * committing._AHEAD
        reader.discard(put(lane, torch.ones(10)))


# --- /dev/shm ----------------------------------------------------------------------------------------------


def travel_beside_a_small_shm(nbytes: int) -> tuple[bool, int]:
    mount_over("/dev/shm", "size=64m")
    tensor = torch.arange(nbytes // 8)
    with Lane({"tp": 1}, capacity=nbytes) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        arrived = reader.take(put(lane, tensor))
        shm = os.statvfs("/dev/shm")
        return torch.equal(arrived, tensor), (shm.f_blocks - shm.f_bfree) * shm.f_frsize


def test_the_size_of_shm_does_not_matter() -> None:
    require_mounts()
    assert run(travel_beside_a_small_shm, 256 * MIB) == (True, 0)


def fill_the_fallback(pipe: Connection) -> tuple[int, int, list[Path]]:
    """A lane in a /dev/shm of 64 MiB, until it refuses; then once more beside a file of another program."""
    mount_over("/dev/shm", "size=64m")
    forbid(Deny("memfd_create", errno.ENOSYS))
    tensor = torch.ones(2 * MIB, dtype=torch.uint8)
    with Lane({"tp": 1}, capacity=1 << 30) as lane:
        pipe.send((lane.invitation, lane.stats().degraded))
        assert lane.wait_open(DEADLINE)
        counts = []
        for _ in range(2):
            tickets, refused = put_until_refused(lane, tensor)
            counts.append(len(tickets))
            shm = os.statvfs("/dev/shm")
            assert shm.f_bavail * shm.f_frsize >= 32 * MIB, "half of it is left for others"
            pipe.send((tickets, refused))
            pipe.recv()
        # What was committed stays ours when another program fills the rest.
        with (
            pytest.raises(OSError, match="No space left"),
            Path("/dev/shm/other").open("wb", buffering=0) as other,
        ):
            while True:
                other.write(bytes(MIB))
        tickets, refused = put_until_refused(lane, tensor)
        counts.append(len(tickets))
        pipe.send((tickets, refused))
        pipe.recv()
        left = [entry for entry in Path("/dev/shm").iterdir() if entry.name != "other"]
        assert counts[0] == counts[1] == counts[2], counts
        return counts[0], lane.stats().tickets, left


def test_a_fallback_file_leaves_half_of_the_room() -> None:
    """As in a container with the 64 MiB that Docker gives, of which NCCL needs some."""
    require_mounts()
    require_filters()
    with Child(fill_the_fallback) as child, Reader("tp") as reader:
        invitation, degraded = child.hear()
        assert "of which half is left free" in degraded[0]
        reader.join(invitation)
        for _ in range(3):
            tickets, refused = child.hear()
            assert refused.cause == "full" and "left for the lane" in refused.detail, refused
            for ticket in tickets:
                assert reader.take(ticket).all()
            child.say()
        count, tickets_out, left = child.result()
        assert 12 <= count <= 16 and (tickets_out, left) == (0, [])
