"""Sandboxes that really lack a feature of the kernel: tensors travel all the same, or the lane says why not."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mmlane import host
from mmlane.lane import (
    Invitation,
    JoinRefused,
    Lane,
    LaneUnavailable,
    Reader,
    Refused,
    failpoints,
    issuing,
    memory,
    status,
)
from mmlane_patches import leftovers
from mmlane_patches.verdicts import Candidate
from tests.lane.harness.child import Child, run
from tests.lane.harness.confinement import (
    Deny,
    forbid,
    limit,
    limit_descriptors,
    mount_over,
    require_filters,
    require_mounts,
)
from tests.lane.harness.kernel import blocks, open_files
from tests.lane.harness.lane_with_readers import backing
from tests.lane.harness.waiting import DEADLINE, eventually

MIB = 1 << 20
BASE = issuing.SLOTS * 8

NO_MEMFD = Deny("memfd_create", errno.ENOSYS)
NO_MEMFD_EITHER = Deny("memfd_create", errno.EPERM)
NO_SEALS = Deny("fcntl", errno.EINVAL, 1, (1033,))  # F_ADD_SEALS
NO_POPULATE = Deny("madvise", errno.EINVAL, 2, (22, 23))
NO_FALLOCATE = Deny("fallocate", errno.EOPNOTSUPP)
NO_HOLES = Deny("fallocate", errno.EOPNOTSUPP, 1, (3,))  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ALL = (NO_MEMFD, NO_SEALS, NO_POPULATE, NO_FALLOCATE)


class Log(logging.Handler):
    """What the lane says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("mmlane.lane").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def travel(lane: Lane, readers: list[Reader]) -> None:
    """Tensors that need more memory each time, in all modes, released and put over each other."""
    for nbytes in (0, 5000, 3 * MIB, 9 * MIB, 70_000, 9 * MIB):
        tensor = torch.randint(256, (nbytes,), dtype=torch.uint8)
        for mode in ("view", "cow", "clone"):
            ticket = lane.put(tensor)
            assert isinstance(ticket, bytes), ticket
            for reader in readers:
                taken = reader.take(ticket, mode=mode)
                assert torch.equal(taken, tensor)
                if mode != "view":
                    taken += 1
                del taken
    assert lane.stats().tickets == 0


def confined(denials: tuple[Deny, ...], place: str) -> tuple[tuple[str, ...], list[str]]:
    """A lane and its readers where some things are missing. Returns what it says of that."""
    log = Log()
    if place:
        mount_over(place, "size=256m")
    if denials:
        forbid(*denials)
    with Lane({"tp": 2}, capacity=32 * MIB, idle=0.1) as lane, Reader("tp", 0) as one, Reader("tp", 1) as two:
        one.join(lane.invitation)
        two.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        travel(lane, [one, two])
        # And so it goes when memory has been idle.
        eventually(
            lambda: not lane.stats().committed_bytes or lane._committer.never_decommits, "memory goes or is kept"
        )
        travel(lane, [one, two])
        stats = lane.stats()
        assert stats.state == "open" and not stats.malformed_messages and not stats.rejected_peers
        return stats.degraded, log.lines


@pytest.mark.parametrize(
    ("denials", "place", "wanted"),
    [
        ((), "", []),
        ((NO_MEMFD,), "", ["memfd_create: [Errno 38]", "F_ADD_SEALS"]),
        ((NO_MEMFD_EITHER,), "", ["memfd_create: [Errno 1]", "F_ADD_SEALS"]),
        ((NO_SEALS,), "", ["F_ADD_SEALS: [Errno 22]"]),
        ((), "/proc", ["read-only descriptor: [Errno 2]"]),
        ((NO_POPULATE,), "", ["MADV_POPULATE_WRITE"]),
        ((NO_HOLES,), "", ["hole punching: [Errno 95]"]),
        ((NO_FALLOCATE,), "", ["hole punching: [Errno 95]"]),
        (
            ALL,
            "/proc",
            ["memfd_create", "F_ADD_SEALS", "read-only descriptor", "MADV_POPULATE_WRITE", "hole punching"],
        ),
    ],
    ids=[
        "all is there",
        "no memfd",
        "memfd denied",
        "no seals",
        "no proc",
        "no populate",
        "no holes",
        "no fallocate",
        "nothing",
    ],
)
def test_a_lane_works_without_a_kernel_feature_and_says_so(
    denials: tuple[Deny, ...], place: str, wanted: list[str]
) -> None:
    """One line for each thing: what it is, what was found, what follows."""
    if lacking := [feature.name for feature in host.kernel_features() if not feature.works]:
        pytest.skip(f"this machine itself lacks {', '.join(lacking)}")
    if place:
        require_mounts()
    if denials:
        require_filters()
    degraded, log = run(confined, denials, place)
    assert len(degraded) == len(wanted), degraded
    for line, start in zip(degraded, wanted, strict=True):
        assert line.startswith(start) and ("; " in line), line
        assert sum(said.endswith(f"goes without {line}") for said in log) == 1, log
    assert len(log) == len(wanted), log


def commit_by_hand() -> None:
    """Where there is no fallocate, glibc writes a byte to each page."""
    forbid(NO_FALLOCATE)
    with Lane({"tp": 1}, capacity=64 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        assert isinstance(lane.put(torch.ones(20 * MIB, dtype=torch.uint8)), bytes)
        ahead = 8 * MIB  # which the lane's own thread commits
        eventually(lambda: lane.stats().committed_bytes == 20 * MIB + ahead, "all of it is committed")
        assert blocks(backing(lane).fd) == BASE + 20 * MIB + ahead


def test_without_fallocate_memory_is_committed_all_the_same() -> None:
    require_filters()
    run(commit_by_hand)


def fill_without_fallocate() -> tuple[str, str, bool]:
    """A file system that runs full, and a kernel that reserves nothing: an error still, and no SIGBUS."""
    mount_over("/dev/shm", "size=16m")
    forbid(NO_MEMFD, NO_FALLOCATE)
    with Lane({"tp": 1}, capacity=256 * MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        memory.Backing.grant = lambda self, nbytes: memory.Grant(nbytes)  # type: ignore[method-assign]  # others fill it now
        tensor = torch.ones(MIB, dtype=torch.uint8)
        tickets = []
        while isinstance(ticket := lane.put(tensor), bytes):
            tickets.append(ticket)
        assert all(reader.take(ticket).all() for ticket in tickets)
        return ticket.cause, ticket.detail, isinstance(lane.put(tensor), bytes)


def test_a_full_file_system_without_fallocate_refuses() -> None:
    require_mounts()
    require_filters()
    cause, detail, again = run(fill_without_fallocate)
    assert cause == "full" and "No space left" in detail and again


def keep_what_cannot_be_handed_back() -> tuple[int, int, int]:
    """Returns what was committed at the end of each of three rounds of use and idleness."""
    forbid(NO_HOLES)
    found = []
    with Lane({"tp": 1}, capacity=64 * MIB, idle=0.05) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        for _ in range(3):
            travel(lane, [reader])
            eventually(
                lambda: lane._control.agenda.next_look is None, "the end of looking"
            )  # it does not look for ever
            found.append(blocks(backing(lane).fd))
            assert found[-1] == BASE + lane.stats().committed_bytes
        return found[0], found[1], found[2]


def test_what_cannot_be_handed_back_is_used_again() -> None:
    require_filters()
    first, second, third = run(keep_what_cannot_be_handed_back)
    assert first == second == third > 9 * MIB


# --- descriptors that do not arrive ------------------------------------------------------------------------


def join_by_path(pipe: Connection, invitation: Invitation) -> list[str]:
    """Join without room for a descriptor when one is sent: the kernel drops it, as where a policy forbids it."""
    log = Log()
    limits: list[int] = []

    def probe(point: str) -> None:
        if point == "join.greeted":
            limits.append(limit_descriptors(0))
        elif point == "join.received":
            limit(resource.RLIMIT_NOFILE, limits.pop())

    failpoints.probe = probe
    with Reader("tp") as reader:
        reader.join(invitation)
        pipe.send("joined")
        assert reader.take(pipe.recv()).sum() == 10
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(reader._listener.links[invitation.name].descriptor.fd, b"x", 0)
    assert not limits
    return log.lines


def test_a_descriptor_that_does_not_arrive_is_opened_by_path() -> None:
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Child(join_by_path, lane.invitation) as child:
        assert child.hear() == "joined" and lane.wait_open(DEADLINE)
        ticket = lane.put(torch.ones(10))
        assert isinstance(ticket, bytes)
        child.say(ticket)
        (line,) = child.result()
        assert line.startswith(f"lane {lane.name} goes without SCM_RIGHTS: ")
        assert f"opened as /proc/{os.getpid()}/fd/" in line


def join_without_proc(invitation: Invitation) -> str:
    mount_over("/proc", "size=64k")
    with Reader("tp") as reader:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        numbers = []
        while (number := os.open(os.devnull, os.O_RDONLY)) < 100:
            numbers.append(number)

        def probe(point: str) -> None:
            if point == "join.greeted":
                limit(resource.RLIMIT_NOFILE, number + 1)
            elif point == "join.received":
                limit(resource.RLIMIT_NOFILE, before)

        failpoints.probe = probe
        with pytest.raises(JoinRefused) as refusal:
            reader.join(invitation)
        failpoints.probe = None
        reader.join(invitation)  # the next time all is there
        return str(refusal.value)


def test_no_descriptor_and_no_proc_is_a_refusal() -> None:
    require_mounts()
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        text = run(join_without_proc, lane.invitation)
        assert "could not be mapped" in text and f"/proc/{os.getpid()}/fd/" in text
        assert lane.stats().rejected_peers == 1


# --- what there is no lane without -------------------------------------------------------------------------


def open_lane(denials: tuple[Deny, ...], place: str) -> tuple[str, list[str]]:
    """Why a lane cannot be had, and what descriptors are left of it."""
    before = open_files()
    if place:
        mount_over(place, "size=64k,mode=0500,nr_inodes=1")
    forbid(*denials)
    with pytest.raises(LaneUnavailable) as refusal:
        Lane({"tp": 1}, capacity=4 * MIB)
    return str(refusal.value), list(open_files() - before)


@pytest.mark.parametrize(
    ("denials", "place", "wanted"),
    [
        ((Deny("eventfd2", errno.ENOSYS),), "", ["eventfd: Function not implemented", "allow in the sandbox"]),
        (
            (Deny("socket", errno.EPERM, 0, (socket.AF_UNIX,)),),
            "",
            ["a Unix socket in the abstract namespace: Operation not permitted", "allow in the sandbox"],
        ),
        ((Deny("epoll_create1", errno.ENOSYS),), "", ["epoll: Function not implemented", "allow in the sandbox"]),
        ((Deny("fallocate", errno.EPERM),), "", ["fallocate: Operation not permitted", "allow in the sandbox"]),
        (
            (NO_MEMFD,),
            "/dev/shm",
            ["memfd_create: [Errno 38]", "O_TMPFILE in /dev/shm: [Errno", "Allow memfd_create in the sandbox"],
        ),
    ],
    ids=["eventfd", "socket", "epoll", "fallocate", "memory without a name"],
)
def test_a_lane_that_cannot_be_made_says_what_is_missing(
    denials: tuple[Deny, ...], place: str, wanted: list[str]
) -> None:
    require_filters()
    if place:
        require_mounts()
    text, left = run(open_lane, denials, place)
    for words in wanted:
        assert words in text, text
    assert left == []


def join_lane(denial: Deny, invitation: Invitation) -> str:
    """Why a reader cannot be had or cannot join."""
    forbid(denial)
    with pytest.raises((LaneUnavailable, JoinRefused)) as refusal, Reader("tp") as reader:
        reader.join(invitation)
    return f"{refusal.type.__name__}: {refusal.value}"


@pytest.mark.parametrize(
    ("denial", "start", "words"),
    [
        (Deny("eventfd2", errno.ENOSYS), "LaneUnavailable", "eventfd: Function not implemented"),
        (Deny("epoll_create1", errno.EPERM), "LaneUnavailable", "epoll: Operation not permitted"),
        (
            Deny("socket", errno.EAFNOSUPPORT, 0, (socket.AF_UNIX,)),
            "JoinRefused",
            "a Unix socket: Address family not supported",
        ),
    ],
    ids=["eventfd", "epoll", "socket"],
)
def test_a_reader_that_cannot_be_made_says_what_is_missing(denial: Deny, start: str, words: str) -> None:
    require_filters()
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        text = run(join_lane, denial, lane.invitation)
        assert text.startswith(start) and words in text, text
        assert not lane.is_open


# --- the control thread ------------------------------------------------------------------------------------


def meet_a_full_file_system_ahead_of_need() -> tuple[bool, int]:
    """Memory ahead of need cannot be had: the thread that asked for it lives on, and answers."""
    mount_over("/dev/shm", "size=16m")
    forbid(NO_MEMFD)
    with Lane({"tp": 1}, capacity=64 * MIB, segment=MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        tensor = torch.ones(3 * MIB, dtype=torch.uint8)
        old = lane.put(tensor)
        eventually(lambda: lane.stats().committed_bytes == 6 * MIB, "as much memory again ahead of need")
        assert isinstance(lane.put(tensor), bytes)
        eventually(
            lambda: lane.stats().committed_bytes == 6 * MIB and lane._committer.starved, "an attempt that fails"
        )
        assert isinstance(old, bytes)
        reader.discard(old)
        eventually(lambda: lane.stats().tickets == 1, "the ticket is back")
        ticket = lane.put(tensor)
        assert isinstance(ticket, bytes)
        return torch.equal(reader.take(ticket), tensor), status.ask(lane.name).tickets


def test_the_lane_serves_on_when_memory_ahead_of_need_cannot_be_had() -> None:
    require_mounts()
    require_filters()
    assert run(meet_a_full_file_system_ahead_of_need) == (True, 1)


class Broken(Exception):
    """An exception that no code expects."""


def break_the_thread(pipe: Connection, point: str) -> tuple[list[str], str, str, bool]:
    """An exception in the control thread that its code does not expect."""
    log = Log()

    def probe(reached: str) -> None:
        if reached == point:
            raise Broken(point)

    with Lane({"tp": 1}, capacity=64 * MIB, idle=0.05) as lane:
        pipe.send(lane.invitation)
        assert lane.wait_open(DEADLINE)
        held = lane.put(torch.ones(10))
        pipe.send(held)
        pipe.recv()
        failpoints.probe = probe
        pipe.send("set")
        eventually(lambda: not lane.is_open, "the end of the lane")
        failpoints.probe = None
        refused = lane.put(torch.ones(10))
        assert isinstance(refused, Refused)
        lane._control.join()
        assert lane.stats().state == "closed" and lane.wait_open(0) is False
        lane.drain()
        lane.close()
        return log.lines, refused.cause, refused.detail, lane._committer.memory is None


@pytest.mark.parametrize("point", ["decommit.chosen", "drain.received"])
def test_a_control_thread_that_fails_says_so(point: str) -> None:
    """The lane is closed with the error; readers keep what they hold, and learn that it has ended (4)."""
    with Child(break_the_thread, point) as child, ExitStack() as scope:
        reader = scope.enter_context(Reader("tp"))
        invitation = child.hear()
        reader.join(invitation)
        held = reader.take(child.hear())
        child.say()
        assert child.hear() == "set"
        log, cause, detail, closed = child.result()
        assert cause == "closed" and f"Broken('{point}')" in detail, detail
        assert any(line.startswith(f"lane {invitation.name} is closed") for line in log), log
        assert closed
        assert held.sum() == 10
        eventually(lambda: reader.lanes() == (), "the end of the lane")


# --- what /proc says ---------------------------------------------------------------------------------------


def travel_beside_a_mount_without_a_source() -> tuple[bool, int | None, host.Mount | None, list[Candidate]]:
    mount_over("/dev/shm", "size=64m", source="")
    with Lane({"tp": 1}) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        travel(lane, [reader])
    mounted = " - tmpfs  rw" in Path("/proc/self/mountinfo").read_text()
    reclaimed, _ = leftovers.reclaim(private=True)
    return mounted, host.memory().limit, host.mount_of(host.SHM), reclaimed


def test_a_mount_without_a_source_is_recognised() -> None:
    """Today's kernels write an empty field for it."""
    require_mounts()
    mounted, limit, mount, reclaimed = run(travel_beside_a_mount_without_a_source)
    if not mounted:
        pytest.skip("this kernel has a word for a mount without a source")
    assert limit == host.memory().limit
    assert mount is not None and mount.kind == "tmpfs" and "size=65536k" in mount.options
    assert reclaimed == []
