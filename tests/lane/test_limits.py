"""Where address space, descriptors, threads or tickets run out: a refusal with a reason, and nothing is left."""

from __future__ import annotations

import gc
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection

import pytest
import torch

from mmlane.lane import Invitation, JoinRefused, Lane, LaneUnavailable, Reader, Refused, issuing, memory
from mmlane.lane.mapping import Mapping
from tests.lane.harness.child import Child, run
from tests.lane.harness.confinement import become, limit, limit_address_space, limit_descriptors
from tests.lane.harness.kernel import open_files
from tests.lane.harness.lane_with_readers import copy, put
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

MIB = 1 << 20
BASE = issuing.SLOTS * 8


# --- limits of a process -----------------------------------------------------------------------------------


def open_with_small_files() -> tuple[str, int]:
    limit(resource.RLIMIT_FSIZE, MIB)
    before = open_files()
    with pytest.raises(LaneUnavailable) as refusal:
        Lane({"tp": 1}, capacity=64 * MIB)
    left = (open_files() - before).total()
    limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    Lane({"tp": 1}, capacity=64 * MIB).close()
    return str(refusal.value), left


def test_a_limit_on_file_sizes_is_named() -> None:
    text, left = run(open_with_small_files)
    assert "File too large" in text and "`ulimit -f`" in text and left == 0


def open_larger_than_can_be_expressed(capacity: int) -> int:
    before = open_files()
    for make in (lambda: Lane({"tp": 1}, capacity=capacity), lambda: memory.attempt(capacity)):
        with pytest.raises(LaneUnavailable, match="could not be set up"):
            make()
    return (open_files() - before).total()


@pytest.mark.parametrize("capacity", [1 << 62, 1 << 63, 1 << 64, 10**40])
def test_a_capacity_beyond_any_address_space_is_refused(capacity: int) -> None:
    assert run(open_larger_than_can_be_expressed, capacity) == 0


def open_with_little_address_space() -> tuple[str, int]:
    before = open_files()
    limit_address_space(64 * MIB)
    with pytest.raises(LaneUnavailable) as refusal:
        Lane({"tp": 1}, capacity=1 << 30)
    left = (open_files() - before).total()
    with Lane({"tp": 1}, capacity=4 * MIB):
        return str(refusal.value), left


def test_a_producer_without_address_space_is_told() -> None:
    text, left = run(open_with_little_address_space)
    assert "mmap: Cannot allocate memory" in text and "`ulimit -v`" in text and "smaller capacity" in text
    assert left == 0


def open_without_threads() -> list[str]:
    if os.geteuid() == 0:
        become()
    before = open_files()
    limit(resource.RLIMIT_NPROC, 1)
    texts = []
    makers: list[Callable[[], object]] = [lambda: Lane({"tp": 1}, capacity=4 * MIB), lambda: Reader("tp")]
    for make in makers:
        with pytest.raises(LaneUnavailable) as refusal:
            make()
        texts.append(str(refusal.value))
        del refusal
        gc.collect()
        assert not open_files() - before
    return texts


def test_a_lane_or_reader_without_a_thread_says_why() -> None:
    for text in run(open_without_threads):
        assert "thread" in text and "`ulimit -u`" in text


def with_no_more_descriptors() -> tuple[Counter[str], int]:
    """Let this process open no more. Returns those that it has, and the limit before."""
    unlimited = limit_descriptors(0)
    limit(resource.RLIMIT_NOFILE, unlimited)
    found = open_files()
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
        assert not open_files() - before, said
        limit_descriptors(len(said))


def test_a_producer_without_descriptors_is_told() -> None:
    said = run(open_with_few_descriptors)
    assert 3 <= len(said) <= 10
    for text in said:
        assert "Too many open files" in text and "`ulimit -n`" in text


def attempt(invitation: Invitation) -> str:
    """Why a reader cannot join; nothing when it can."""
    try:
        with Reader("tp") as reader:
            reader.join(invitation, timeout=DEADLINE)
    except (LaneUnavailable, JoinRefused) as error:
        return str(error)
    return ""


def join_with_few_descriptors(invitation: Invitation) -> list[str]:
    """Why a reader could not join with none, one, two... descriptors, until it could."""
    before, unlimited = with_no_more_descriptors()
    said: list[str] = []
    while problem := attempt(invitation):
        said.append(problem)
        limit(resource.RLIMIT_NOFILE, unlimited)
        eventually(lambda: not open_files() - before, "the end of a reader")
        limit_descriptors(len(said))
    return said


def test_a_reader_without_descriptors_is_told() -> None:
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        said = run(join_with_few_descriptors, lane.invitation)
    assert len(said) == 4, said
    for text, where in zip(said, ("epoll", "eventfd", "Unix socket", "mapped"), strict=True):
        assert where in text and "Too many open files" in text
    assert "`ulimit -n`" in said[0] and "`ulimit -n`" in said[3]


def join_with_little_address_space(pipe: Connection, invitation: Invitation) -> str:
    with Reader("tp") as reader:
        before = resource.getrlimit(resource.RLIMIT_AS)[0]
        limit_address_space(64 * MIB)
        with pytest.raises(JoinRefused) as refusal:
            reader.join(invitation)
        pipe.send(str(refusal.value))
        pipe.recv()
        limit(resource.RLIMIT_AS, before)
        reader.join(invitation)
        pipe.send("joined")
        assert reader.take(pipe.recv()).sum() == 10
        return "took"


def test_a_lane_that_a_reader_cannot_map_stays_shut(caplog: pytest.LogCaptureFixture) -> None:
    """Both sides say why; the reader can try again (1)."""
    with (
        Lane({"tp": 1}, capacity=1 << 30) as lane,
        Child(join_with_little_address_space, lane.invitation) as child,
    ):
        text = child.hear()
        assert f"{(1 << 30) + BASE} bytes could not be mapped" in text and "`ulimit -v`" in text
        eventually(lambda: lane.stats().rejected_peers == 1, "its leaving")
        refused = lane.put(torch.ones(10))
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        assert "missing: reader 0 of 'tp'" in refused.detail and not lane.is_open
        (record,) = [record for record in caplog.records if "could not be mapped" in record.message]
        assert record.levelname == "WARNING" and "Cannot allocate memory" in record.message
        child.say()
        assert child.hear() == "joined" and lane.wait_open(DEADLINE)
        child.say(put(lane, torch.ones(10)))
        assert child.result() == "took"


def edit_without_address_space(pipe: Connection, invitation: Invitation) -> bool:
    """Take as `cow` where no mapping can be had any more; there is room on the heap, as a working process has."""
    with Reader("tp") as reader:
        reader.join(invitation)
        pipe.send("joined")
        ticket = pipe.recv()
        heap = [torch.zeros(2048) for _ in range(64)]
        limit(resource.RLIMIT_AS, 1)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            Mapping(os.open("/dev/zero", os.O_RDONLY), MIB, private=True)
        del heap[1:-1]
        tensor = reader.take(ticket, mode="cow")
        pipe.send("taken")
        pipe.recv()
        tensor += 1
        return tensor.tolist() == [2.0] * 2000


def test_where_no_private_mapping_can_be_had_cow_clones() -> None:
    """Taking does not fail on one rank alone (1)."""
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Child(edit_without_address_space, lane.invitation) as child:
        assert child.hear() == "joined" and lane.wait_open(DEADLINE)
        child.say(put(lane, torch.ones(2000)))
        assert child.hear() == "taken"
        assert lane.stats().tickets == 0, "a clone is released at once"
        child.say()
        assert child.result()


# --- a lane that serves on while something is short --------------------------------------------------------


class Warnings(logging.Handler):
    """Counts what the lane says."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word
        self.count = 0
        logging.getLogger("mmlane.lane").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += self.word in record.getMessage()


def produce_without_descriptors(pipe: Connection) -> tuple[int, float]:
    """A lane that cannot let readers in for two seconds, with the one that it has."""
    warnings = Warnings("raise `ulimit -n`")
    with Lane({"tp": 3}, capacity=32 * MIB) as lane:
        pipe.send(lane.invitation)
        eventually(lambda: lane.stats().joined == {"tp": [0]}, "the first reader")
        before = limit_descriptors(0)
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        began = time.monotonic()
        pipe.send("exhausted")
        eventually(lambda: warnings.count >= 2, "another attempt")
        seen, took = warnings.count, time.monotonic() - began
        assert lane.stats().joined == {"tp": [0]}
        limit(resource.RLIMIT_NOFILE, before)
        assert lane.wait_open(DEADLINE), "the readers that waited are in"
        pipe.send(put(lane, torch.ones(10)))
        pipe.recv()
        assert lane.stats().tickets == 0
        return seen, took


def test_readers_wait_while_the_producer_has_no_descriptors_left() -> None:
    with Child(produce_without_descriptors) as child, ExitStack() as scope:
        invitation = child.hear()
        first, *others = [scope.enter_context(Reader("tp", number)) for number in range(3)]
        first.join(invitation)
        assert child.hear() == "exhausted"
        with ExitStack() as waiting:
            for reader in others:
                waiting.enter_context(in_a_thread(lambda reader=reader: reader.join(invitation, timeout=DEADLINE)))  # type: ignore[misc]
        ticket = child.hear()
        for reader in (first, *others):
            assert reader.take(ticket).sum() == 10
        child.say()
        seen, took = child.result()
        assert 2 <= seen <= took + 2, "it tries once a second and sleeps in between"


# --- tickets -----------------------------------------------------------------------------------------------


def test_as_many_tickets_as_there_are_slots() -> None:
    """One more is refused, and what was copied for it is free again (2)."""
    with Lane({"tp": 1}, capacity=8 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        tensor, other = torch.ones(10), torch.ones(20)
        with copy(lane, tensor) as room:
            tickets = [room.publish() for _ in range(issuing.SLOTS)]
            assert len({ticket for ticket in tickets if isinstance(ticket, bytes)}) == issuing.SLOTS
            before = lane.stats()
            with copy(lane, other) as another:
                for one_more in (room.publish, partial(lane.put, other), another.publish):
                    refused = one_more()
                    assert isinstance(refused, Refused) and refused.cause == "full", refused
                    assert "65536 tickets are out" in refused.detail
                assert lane.stats().extents == 2  # the copy is there as long as it is kept
        stats = lane.stats()
        assert (stats.used_bytes, stats.tickets, stats.extents) == (before.used_bytes, issuing.SLOTS, 1)
        for ticket in tickets:
            assert isinstance(ticket, bytes)
            reader.discard(ticket)
        eventually(lambda: lane.stats().tickets == 0, "the end of all tickets")
        reader.discard(put(lane, tensor))
