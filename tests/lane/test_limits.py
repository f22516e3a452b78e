"""Where memory, address space, descriptors or threads run out: a refusal with a reason, never a killed process."""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mmlane import host
from mmlane.lane import JoinRefused, Lane, LaneUnavailable, Reader, Refused, memory, points, producer
from tests.lane.sandbox import (
    DEADLINE,
    Child,
    Deny,
    Died,
    Group,
    become,
    descriptors,
    forbid,
    limit,
    limit_address_space,
    limit_descriptors,
    memory_group,
    mount_over,
    require_filters,
    require_mounts,
    run,
    wait_until,
)

MIB = 1 << 20
BASE = producer.SLOTS * 8


@pytest.fixture
def group() -> Iterator[Group]:
    """A memory control group of 160 MiB."""
    with memory_group(160 * MIB) as group:
        yield group


def put(lane: Lane, tensor: torch.Tensor) -> bytes:
    """A ticket, and nothing else."""
    ticket = lane.put(tensor)
    assert isinstance(ticket, bytes), ticket
    return ticket


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
        pipe.send(lane.address)
        assert lane.wait_open(DEADLINE)
        while pipe.recv():
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(partial(put_until_refused, lane), [tensor] * threads))
            left = host.memory().available
            pipe.send(
                ([ticket for tickets, _ in found for ticket in tickets], [refused for _, refused in found], left)
            )


@pytest.mark.parametrize("threads", [1, 4])
def test_a_control_group_at_its_limit_refuses_and_kills_nobody(group: Group, threads: int) -> None:
    with Child(produce_in_a_group, group, threads) as child, Reader("tp") as reader:
        reader.join(child.hear())
        for _ in range(3):
            child.say(True)
            tickets, refusals, left = child.hear()
            assert 10 <= len(tickets) < 20, "most of the memory is used"
            assert left >= 8 * MIB, "but for a sixteenth of it, which is 10 MiB"
            for refused in refusals:
                assert refused.cause == "full" and "no memory for 8388608 bytes" in refused.detail, refused
                assert "not for the lane" in refused.detail
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
        pipe.send(lane.address)
        assert lane.wait_open(DEADLINE)
        points.probe = probe
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
        pipe.send(lane.address)
        assert lane.wait_open(DEADLINE)
        refused = lane.put(tensor)
        stats = lane.stats()
        put(lane, tensor[:MIB])
        return refused.cause if isinstance(refused, Refused) else refused, stats.warm, stats.taken


def test_a_tensor_for_which_there_is_no_memory_commits_none(group: Group) -> None:
    with Child(put_more_than_there_is, group) as child, Reader("tp") as reader:
        reader.join(child.hear())
        cause, warm, taken = child.result()
        assert (cause, taken) == ("full", 0) and warm <= 2 * producer._AHEAD
        assert group.kills() == 0


def capacity_in_a_group(group: Group) -> tuple[int, int, int]:
    group.enter()
    with Lane({"tp": 1}) as lane:
        return memory.default_capacity(), lane.stats().capacity, host.memory().available


def test_the_default_capacity_follows_the_control_group(group: Group) -> None:
    default, capacity, available = run(capacity_in_a_group, group)
    assert default == capacity == 40 * MIB
    assert available <= 160 * MIB


def read_in_a_group(pipe: Connection, group: Group, address: str) -> int:
    group.enter()
    with Reader("tp") as reader:
        reader.join(address)
        pipe.send("joined")
        tensor = reader.take(pipe.recv())
        assert tensor.sum() == tensor.numel()
        return group.used()


def test_readers_are_not_charged(group: Group) -> None:
    """More than a reader's control group may have can be read there."""
    with Lane({"tp": 1}, capacity=256 * MIB) as lane, Child(read_in_a_group, group, lane.address) as child:
        assert child.hear() == "joined"
        child.say(put(lane, torch.ones(50 * MIB)))
        assert child.result() < 64 * MIB


# --- memory of the machine ---------------------------------------------------------------------------------


def committed(lane: Lane) -> int:
    """Bytes of memory behind a lane, directory included, as the kernel counts."""
    return os.fstat(lane._backing.fd).st_blocks * 512


def test_nothing_is_committed_before_use() -> None:
    with Lane({"tp": 1}, capacity=64 << 30) as lane, Reader("tp") as reader:
        reader.join(lane.address)
        stats = lane.stats()
        assert (stats.capacity, stats.warm, stats.taken) == (64 << 30, 0, 0)
        assert committed(lane) == BASE
        held = reader.take(put(lane, torch.ones(10)))
        wait_until(lambda: committed(lane) == BASE + lane.stats().warm, "memory that is as large as it says")
        assert lane.stats().warm <= 3 * producer.SEGMENT, "one that was needed, and 8 MiB ahead"
        assert held.sum() == 10


def test_more_than_the_machine_has_is_address_room_only() -> None:
    """What cannot be had is refused when it is wanted, not before."""
    with Lane({"tp": 1}, capacity=1 << 40) as lane, Reader("tp") as reader:
        reader.join(lane.address)
        refused = lane.put(torch.empty(1 << 39, dtype=torch.uint8, device="meta"))
        assert isinstance(refused, Refused) and refused.cause == "unsupported"
        there_is = host.memory().total
        refused = lane.put(torch.zeros(1, dtype=torch.uint8).expand(there_is))
        assert isinstance(refused, Refused) and refused.cause == "full", refused
        assert f"no memory for {there_is} bytes" in refused.detail
        assert lane.stats().taken == 0 and committed(lane) <= BASE + 2 * producer._AHEAD
        reader.discard(put(lane, torch.ones(10)))


# --- /dev/shm ----------------------------------------------------------------------------------------------


def travel_beside_a_small_shm(nbytes: int) -> tuple[bool, int]:
    mount_over("/dev/shm", "size=64m")
    tensor = torch.arange(nbytes // 8)
    with Lane({"tp": 1}, capacity=nbytes) as lane, Reader("tp") as reader:
        reader.join(lane.address)
        arrived = reader.take(put(lane, tensor))
        shm = os.statvfs("/dev/shm")
        return torch.equal(arrived, tensor), (shm.f_blocks - shm.f_bfree) * shm.f_frsize


def test_the_size_of_shm_does_not_matter() -> None:
    require_mounts()
    assert run(travel_beside_a_small_shm, 256 * MIB) == (True, 0)


def fill_the_fallback(pipe: Connection) -> tuple[int, int, list[Path]]:
    """A lane in a /dev/shm of 32 MiB, until that is full, and then once more with somebody else's file in it."""
    mount_over("/dev/shm", "size=32m")
    forbid(Deny("memfd_create", errno.ENOSYS))
    tensor = torch.ones(2 * MIB, dtype=torch.uint8)
    with Lane({"tp": 1}, capacity=1 << 30) as lane:
        pipe.send((lane.address, lane.stats().degraded))
        assert lane.wait_open(DEADLINE)
        counts = []
        for _ in range(2):
            tickets, refused = put_until_refused(lane, tensor)
            counts.append(len(tickets))
            pipe.send((tickets, refused))
            pipe.recv()
        # What was committed stays ours, whoever fills the rest.
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


def test_a_fallback_file_that_is_full_refuses() -> None:
    require_mounts()
    require_filters()
    with Child(fill_the_fallback) as child, Reader("tp") as reader:
        address, degraded = child.hear()
        assert "bound by its size" in degraded[0]
        reader.join(address)
        for _ in range(3):
            tickets, refused = child.hear()
            assert refused.cause == "full" and "No space left on device" in refused.detail, refused
            for ticket in tickets:
                assert reader.take(ticket).all()
            child.say()
        count, tickets_out, left = child.result()
        assert 12 <= count <= 16 and (tickets_out, left) == (0, [])


# --- limits of a process -----------------------------------------------------------------------------------


def open_with_small_files() -> tuple[str, int]:
    limit(resource.RLIMIT_FSIZE, MIB)
    before = descriptors()
    with pytest.raises(LaneUnavailable) as refusal:
        Lane({"tp": 1}, capacity=64 * MIB)
    left = (descriptors() - before).total()
    limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    Lane({"tp": 1}, capacity=64 * MIB).close()
    return str(refusal.value), left


def test_a_limit_on_file_sizes_is_named() -> None:
    text, left = run(open_with_small_files)
    assert "File too large" in text and "`ulimit -f`" in text and left == 0


def open_larger_than_can_be_expressed(capacity: int) -> int:
    before = descriptors()
    for make in (lambda: Lane({"tp": 1}, capacity=capacity), lambda: memory.attempt(capacity)):
        with pytest.raises(LaneUnavailable, match="could not be set up"):
            make()
    return (descriptors() - before).total()


@pytest.mark.parametrize("capacity", [1 << 62, 1 << 63, 1 << 64, 10**40])
def test_a_capacity_beyond_all_measure_is_refused_like_any_that_is_too_large(capacity: int) -> None:
    assert run(open_larger_than_can_be_expressed, capacity) == 0


def open_with_little_address_space() -> tuple[str, int]:
    before = descriptors()
    limit_address_space(64 * MIB)
    with pytest.raises(LaneUnavailable) as refusal:
        Lane({"tp": 1}, capacity=1 << 30)
    left = (descriptors() - before).total()
    with Lane({"tp": 1}, capacity=4 * MIB):
        return str(refusal.value), left


def test_a_producer_without_address_space_is_told() -> None:
    text, left = run(open_with_little_address_space)
    assert "mmap: Cannot allocate memory" in text and "`ulimit -v`" in text and "smaller capacity" in text
    assert left == 0


def open_without_threads() -> list[str]:
    if os.geteuid() == 0:
        become()
    before = descriptors()
    limit(resource.RLIMIT_NPROC, 1)
    texts = []
    makers: list[Callable[[], object]] = [lambda: Lane({"tp": 1}, capacity=4 * MIB), lambda: Reader("tp")]
    for make in makers:
        with pytest.raises(LaneUnavailable) as refusal:
            make()
        texts.append(str(refusal.value))
        del refusal
        gc.collect()
        assert not descriptors() - before
    return texts


def test_who_cannot_have_a_thread_is_told() -> None:
    for text in run(open_without_threads):
        assert "thread" in text and "`ulimit -u`" in text


def with_no_more_descriptors() -> tuple[Counter[str], int]:
    """Let this process open no more. Returns those that it has, and the limit before."""
    unlimited = limit_descriptors(0)
    limit(resource.RLIMIT_NOFILE, unlimited)
    found = descriptors()
    limit_descriptors(0)
    return found, unlimited


def open_with_few_descriptors() -> list[str]:
    """Why a lane could not be had with none, one, two... descriptors, until it could."""
    before, unlimited = with_no_more_descriptors()
    said: list[str] = []
    while True:
        try:
            Lane({"tp": 1}, capacity=4 * MIB).close()
            return said
        except LaneUnavailable as error:
            said.append(str(error))
        limit(resource.RLIMIT_NOFILE, unlimited)
        gc.collect()
        assert not descriptors() - before, said
        limit_descriptors(len(said))


def test_a_producer_without_descriptors_is_told() -> None:
    said = run(open_with_few_descriptors)
    assert 3 <= len(said) <= 10
    for text in said:
        assert "Too many open files" in text and "`ulimit -n`" in text


def attempt(address: str) -> str:
    """Why a reader cannot join; nothing when it can."""
    try:
        with Reader("tp") as reader:
            reader.join(address, timeout=DEADLINE)
    except (LaneUnavailable, JoinRefused) as error:
        return str(error)
    return ""


def join_with_few_descriptors(address: str) -> list[str]:
    """Why a reader could not join with none, one, two... descriptors, until it could."""
    before, unlimited = with_no_more_descriptors()
    said: list[str] = []
    while problem := attempt(address):
        said.append(problem)
        limit(resource.RLIMIT_NOFILE, unlimited)
        wait_until(lambda: not descriptors() - before, "the end of a reader")
        limit_descriptors(len(said))
    return said


def test_a_reader_without_descriptors_is_told() -> None:
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        said = run(join_with_few_descriptors, lane.address)
    assert len(said) == 4, said
    for text, where in zip(said, ("epoll", "eventfd", "Unix socket", "mapped"), strict=True):
        assert where in text and "Too many open files" in text
    assert "`ulimit -n`" in said[0] and "`ulimit -n`" in said[3]


def join_with_little_address_space(pipe: Connection, address: str) -> str:
    with Reader("tp") as reader:
        before = resource.getrlimit(resource.RLIMIT_AS)[0]
        limit_address_space(64 * MIB)
        with pytest.raises(JoinRefused) as refusal:
            reader.join(address)
        pipe.send(str(refusal.value))
        pipe.recv()
        limit(resource.RLIMIT_AS, before)
        reader.join(address)
        pipe.send("joined")
        assert reader.take(pipe.recv()).sum() == 10
        return "took"


def test_a_lane_that_a_reader_cannot_map_stays_shut(caplog: pytest.LogCaptureFixture) -> None:
    """Both sides say why; the reader can try again (1)."""
    with Lane({"tp": 1}, capacity=1 << 30) as lane, Child(join_with_little_address_space, lane.address) as child:
        text = child.hear()
        assert f"{(1 << 30) + BASE} bytes could not be mapped" in text and "`ulimit -v`" in text
        wait_until(lambda: lane.stats().strangers == 1, "its leaving")
        refused = lane.put(torch.ones(10))
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        assert "0 of 1 in 'tp'" in refused.detail and not lane.is_open
        (record,) = [record for record in caplog.records if "could not be mapped" in record.message]
        assert record.levelname == "WARNING" and "Cannot allocate memory" in record.message
        child.say()
        assert child.hear() == "joined"
        child.say(put(lane, torch.ones(10)))
        assert child.result() == "took"


def edit_without_address_space(pipe: Connection, address: str) -> bool:
    """Take as `cow` where no mapping can be had any more; there is room on the heap, as a working process has."""
    with Reader("tp") as reader:
        reader.join(address)
        pipe.send("joined")
        ticket = pipe.recv()
        heap = [torch.zeros(2048) for _ in range(64)]
        limit(resource.RLIMIT_AS, 1)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            memory.Mapping(os.open("/dev/zero", os.O_RDONLY), MIB, private=True)
        del heap[1:-1]
        tensor = reader.take(ticket, mode="cow")
        pipe.send("taken")
        pipe.recv()
        tensor += 1
        return tensor.tolist() == [2.0] * 2000


def test_where_no_private_mapping_can_be_had_cow_clones() -> None:
    """Taking does not fail on one rank alone (1)."""
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Child(edit_without_address_space, lane.address) as child:
        assert child.hear() == "joined"
        child.say(put(lane, torch.ones(2000)))
        assert child.hear() == "taken"
        assert lane.stats().tickets == 0, "a clone is given back at once"
        child.say()
        assert child.result()


# --- tickets -----------------------------------------------------------------------------------------------


def test_as_many_tickets_as_there_are_slots() -> None:
    """One more is refused, and what was copied for it is free again (2)."""
    with Lane({"tp": 1}, capacity=8 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.address)
        tensor, other = torch.ones(10), torch.ones(20)
        share = lane.share(uses=producer.SLOTS + 3)
        tickets = [lane.put(tensor, share=share) for _ in range(producer.SLOTS)]
        assert len({ticket for ticket in tickets if isinstance(ticket, bytes)}) == producer.SLOTS
        before = lane.stats()
        with lane.share(uses=2) as another:
            for more, its_share in ((tensor, share), (other, None), (other, another)):
                refused = lane.put(more, share=its_share)
                assert isinstance(refused, Refused) and refused.cause == "full", refused
                assert "65536 tickets are out" in refused.detail
            assert lane.stats().extents == 2  # the copy is there for the use that is left
        stats = lane.stats()
        assert (stats.taken, stats.tickets, stats.extents) == (before.taken, producer.SLOTS, 1)
        for ticket in tickets:
            assert isinstance(ticket, bytes)
            reader.discard(ticket)
        wait_until(lambda: lane.stats().tickets == 0, "the end of all tickets")
        reader.discard(put(lane, tensor))
