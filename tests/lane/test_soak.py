"""Everything at once, at random and for long: not one wrong byte, nothing lost, no process that grows.

`--soak SECONDS`, or MMLANE_SOAK, says how long it goes on; MMLANE_SOAK_SEED repeats what a failed run had.
"""

from __future__ import annotations

import ctypes
import gc
import heapq
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import exp, log
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from random import Random
from typing import Any

import pytest
import torch

from mmlane.lane import Refused
from tests.effort import examples
from tests.lane.harness import kernel
from tests.lane.harness.payloads import MODES, Sent, difference, stamp
from tests.lane.harness.peers import DIRECTORY, Company, Peer, Producing, Reading, baseline
from tests.lane.harness.waiting import DEADLINE, eventually

SECONDS = float(examples(12, 120))
SEED = 20_251_107
LEG = 25.0  # seconds after which everything has to come to rest, at the most
CAPACITY = 24 << 20
GROUPS = ("tp", "tp", "vit")
SIZES = (1 << 10, 8 << 20)
SHARES = 8  # puts of one tensor at the most
PUTTERS = 2  # threads that put, per producer
SLACK = 4 << 20  # bytes by which a process may differ between two rests
SCRIBBLE = 0xA5

_libc = ctypes.CDLL(None)


def keep_no_reserve() -> None:
    """Have the allocator give back what is freed, as far as it can: else its reserves hide what is lost."""
    assert _libc.mallopt(-8, 1) == 1  # M_ARENA_MAX
    assert _libc.mallopt(-3, 128 << 10) == 1  # M_MMAP_THRESHOLD, which now stays there


# --- in the producers --------------------------------------------------------------------------------------


class Sender(Producing):
    """A producer that deals tickets to groups of readers, over a pipe to each reader."""

    def __init__(self, number: int, pipes: list[Connection]) -> None:
        keep_no_reserve()
        readers = {group: GROUPS.count(group) for group in GROUPS}
        super().__init__(readers, capacity=CAPACITY, segment=1 << 20, idle=0.5)
        self.number = number
        self.pipes = pipes
        self.sending = threading.Lock()  # all readers of a group get its tickets, in some order
        self.last_seed = [number * PUTTERS + putter << 28 for putter in range(PUTTERS)]


def produce(sender: Sender, seed: str, seconds: float) -> Counter[str]:
    """Put and deal for a while; how many tickets went to whom."""
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(PUTTERS) as pool:
        putters = [
            pool.submit(_put_until, sender, putter, Random(f"{seed} {sender.number} {putter}"), until)
            for putter in range(PUTTERS)
        ]
        counts = sum((putter.result() for putter in putters), Counter[str]())
    for pipe in sender.pipes:
        pipe.send(None)
    return counts


def _put_until(sender: Sender, putter: int, random: Random, until: float) -> Counter[str]:
    counts = Counter[str]()
    sources: list[tuple[torch.Tensor, int]] = []
    while time.monotonic() < until:
        if random.random() < 0.01:
            time.sleep(random.uniform(0.5, 2.0))  # idle memory is decommitted in this time
        if len(sources) > 4 or (sources and random.random() < 0.5):
            tensor, seed = sources.pop(random.randrange(len(sources)))
        else:
            nbytes = int(exp(random.uniform(*map(log, SIZES))))
            seed = sender.last_seed[putter] = sender.last_seed[putter] + 1
            tensor = stamp(seed, nbytes)
        if random.random() < 0.2:  # in place: what was put of it before must stay as it was
            seed = sender.last_seed[putter] = sender.last_seed[putter] + 1
            tensor.numpy()[:] = stamp(seed, len(tensor)).numpy()
        counts += _deal(sender, random, tensor, seed)
        if random.random() < 0.5:
            sources.append((tensor, seed))
    return counts


def _deal(sender: Sender, random: Random, tensor: torch.Tensor, seed: int) -> Counter[str]:
    counts = Counter[str]()
    puts = random.randint(1, SHARES)
    room = sender.lane.copy(tensor) if random.random() < 0.9 else None
    overwritten = False
    for _ in range(puts):
        if isinstance(room, Refused):
            ticket: bytes | Refused = room
            room = sender.lane.copy(tensor)
        else:
            ticket = sender.lane.put(tensor) if room is None else room.publish()
        if isinstance(ticket, Refused):
            assert ticket.cause == "full", ticket
            counts["full"] += 1
            time.sleep(0.001)
            continue
        counts["puts"] += 1
        if room is not None and random.random() < 0.1:  # its copy is as it was
            tensor.numpy().fill(SCRIBBLE)
            overwritten = True
        if random.random() < 0.02:
            sender.lane.withdraw(ticket)
            counts["withdrawn"] += 1
            continue
        group = random.choice(GROUPS)
        counts[group] += 1
        with sender.sending:
            for pipe, its_group in zip(sender.pipes, GROUPS, strict=True):
                if its_group == group:
                    pipe.send(Sent(ticket, seed, len(tensor)))
    if overwritten:
        tensor.numpy()[:] = stamp(seed, len(tensor)).numpy()
    return counts


# --- in the readers ----------------------------------------------------------------------------------------


class Receiver(Reading):
    """A reader that takes what comes over its pipes, one from each producer."""

    def __init__(self, number: int, pipes: list[Connection]) -> None:
        keep_no_reserve()
        super().__init__(GROUPS[number], GROUPS[:number].count(GROUPS[number]))
        self.number = number
        self.pipes = pipes


@dataclass(order=True)
class Holding:
    """A tensor that is held until a time."""

    until: float
    tensor: torch.Tensor = field(compare=False)
    sent: Sent = field(compare=False)
    scribbled: bool = field(compare=False)

    def problem(self) -> str:
        """What is wrong with it, looked at in whole."""
        if not self.scribbled:
            return difference(self.tensor, self.sent.seed, self.sent.nbytes)
        wanted = stamp(self.sent.seed, self.sent.nbytes)
        wanted[::5000] = SCRIBBLE
        return (
            "" if torch.equal(self.tensor, wanted) else f"payload {self.sent.seed} is not what was scribbled on it"
        )


def consume(receiver: Receiver, seed: str) -> Counter[str]:
    """Take and let go until all producers say that it is over; how many came, and what was done with them."""
    random = Random(f"{seed} reader {receiver.number}")
    counts = Counter[str]()
    talking = list(receiver.pipes)
    held: list[Holding] = []
    with ThreadPoolExecutor(1) as elsewhere:
        while talking or held:
            patience = max(held[0].until - time.monotonic(), 0.0) if held else DEADLINE
            ready = wait(talking, patience)
            assert ready or held, "the producers say nothing"
            for pipe in random.sample(ready, len(ready)):
                assert isinstance(pipe, Connection)
                sent = pipe.recv()
                if sent is None:
                    talking.remove(pipe)
                    continue
                counts["came"] += 1
                if random.random() < 0.05:
                    receiver.reader.discard(sent.ticket)
                else:
                    heapq.heappush(held, _take(receiver, random, sent, counts))
            while held and (held[0].until <= time.monotonic() or len(held) > 200):
                holding = heapq.heappop(held)
                if problem := holding.problem():
                    raise AssertionError(f"when let go: {problem}")
                if random.random() < 0.3:
                    elsewhere.submit(vars(holding).clear)  # another thread lets it go
                del holding
    return counts


def _take(receiver: Receiver, random: Random, sent: Sent, counts: Counter[str]) -> Holding:
    mode = random.choice(MODES)
    counts[mode] += 1
    tensor = receiver.reader.take(sent.ticket, mode)
    if problem := difference(tensor, sent.seed, sent.nbytes):
        raise AssertionError(f"taken as {mode}: {problem}")
    scribbled = mode != "view" and random.random() < 0.3
    if scribbled:
        tensor[::5000] = SCRIBBLE  # no other process may ever see that
    if random.random() < 0.3:  # an alias holds it as well as itself
        tensor = tensor.view(1, -1)[0].detach()
    seconds = random.choice((0.0, 0.01, 0.05, 0.2, 1.0)) * random.random()
    return Holding(time.monotonic() + seconds, tensor, sent, scribbled)


# --- from outside ------------------------------------------------------------------------------------------


def tidy(_: Producing | Reading) -> None:
    """Give back to the system what Python and the allocator hold in reserve."""
    gc.collect()
    _libc.malloc_trim(0)


def disturb(peers: list[Peer[Any]], random: Random, seconds: float) -> int:
    """Stop one process after another for a moment; how many."""
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        time.sleep(random.uniform(0.0, 0.2))
        peer = random.choice(peers)
        os.kill(peer.pid, signal.SIGSTOP)
        time.sleep(random.choice((0.01, 0.1, 0.5)) * random.random())
        os.kill(peer.pid, signal.SIGCONT)
        count += 1
    return count


def run_leg(
    senders: list[Peer[Sender]], receivers: list[Peer[Receiver]], random: Random, seed: str, seconds: float
) -> Counter[str]:
    """Have all at work for a while, then look whether all has come, and all has come back."""
    peers: list[Peer[Any]] = [*receivers, *senders]
    for receiver in receivers:
        receiver.start(consume, seed)
    for sender in senders:
        sender.start(produce, seed, seconds)
    counts = Counter(stops=disturb(peers, random, seconds))
    answers: dict[Peer[Any], Counter[str]] = {}
    busy = {peer.fileno(): peer for peer in peers}
    while busy:
        ready = wait(list(busy), DEADLINE)
        assert ready, "no process finishes in time"
        for number in ready:
            assert isinstance(number, int)
            peer = busy.pop(number)
            answers[peer] = peer.answer()
    for sender in senders:
        counts += answers[sender]
        stats = baseline(sender)
        assert (stats.malformed_messages, stats.lost_tickets, stats.rejected_peers) == (0, 0, 0)
        assert {group: len(numbers) for group, numbers in stats.joined.items()} == stats.expected
        counts["shared"] = max(counts["shared"], stats.shared)
    for receiver, group in zip(receivers, GROUPS, strict=True):
        assert answers[receiver]["came"] == counts[group]
        counts += answers[receiver]
    return counts


@dataclass(frozen=True)
class Size:
    """How large a process is."""

    private: int
    mappings: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, peer: Peer[Any]) -> Size:
        return cls(
            kernel.private_memory(peer.pid),
            kernel.mappings(peer.pid),
            len(kernel.descriptors(peer.pid)),
            len(kernel.thread_states(peer.pid)),
        )


def all_memory_goes(sender: Peer[Sender]) -> None:
    """Wait until no more of a lane is committed than there always is."""
    (file,) = kernel.lane_files(sender.pid)
    eventually(lambda: kernel.committed(sender.pid, file) == DIRECTORY, "idle memory goes")


@pytest.mark.long
@pytest.mark.timeout(0)  # it takes as long as it is told to; every wait in it has an end
def test_soak(company: Company, request: pytest.FixtureRequest) -> None:
    """(2, 4, 6)"""
    seconds = request.config.getoption("--soak", None) or float(os.environ.get("MMLANE_SOAK", SECONDS))
    seed = int(os.environ.get("MMLANE_SOAK_SEED", SEED))
    legs = max(4, round(seconds / LEG))
    print(f"soak: {seconds:g} s in {legs} legs, seed {seed}")
    pipes = [[Pipe(duplex=False) for _ in GROUPS] for _ in range(2)]
    senders = [
        company.add_producer(Peer(Sender, number, [there for _, there in row])) for number, row in enumerate(pipes)
    ]
    receivers = [
        company.add(Peer(Receiver, number, [row[number][0] for row in pipes])) for number in range(len(GROUPS))
    ]
    for row in pipes:
        for ends in row:
            for end in ends:
                end.close()
    for receiver in receivers:
        for sender in senders:
            receiver.call(Reading.join, company.invitation(sender))
    for sender in senders:
        assert sender.call(Producing.wait_open)

    random, total = Random(seed), Counter[str]()
    peers: list[Peer[Any]] = [*senders, *receivers]
    first: dict[int, Size] = {}
    for leg in range(legs):
        counts = run_leg(senders, receivers, random, f"{seed} {leg}", seconds / legs)
        print(f"soak: leg {leg}: {dict(counts)}")
        total += counts
        for peer in peers:
            peer.call(tidy)
            size = Size.of(peer)
            before = first.setdefault(peer.pid, size)
            print(f"soak: leg {leg}: process {peer.pid}: {size}")
            assert size.private < before.private + SLACK, (leg, before, size)
            assert size.mappings <= before.mappings + 16, (leg, before, size)  # the allocator has some
            assert (size.descriptors, size.threads) == (before.descriptors, before.threads), (leg, before, size)
    assert not {"puts", "shared", "full", "withdrawn", "stops", *GROUPS, *MODES} - set(total)
    for sender in senders:
        all_memory_goes(sender)
