"""SIGKILL at every named point of the protocol: who is left goes on, and of who is gone nothing is left (4)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any

import pytest

from mmlane.lane import JoinRefused, Mode, points
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Where
from tests.lane.harness.child import Died
from tests.lane.harness.payloads import MODES, Sent
from tests.lane.harness.peers import (
    CAPACITY,
    DIRECTORY,
    FOREVER,
    SIZES,
    Company,
    Peer,
    Producing,
    Reading,
    baseline,
    carries,
    hears_of_the_end,
    refused,
)
from tests.lane.harness.together import SEGMENT
from tests.lane.harness.waiting import eventually

TIMES = (1, 3)  # a first time and one amid everything

Case = tuple[str, int, Where]
# Points that the main thread comes past first, and another one too.
BESIDE = tuple(
    name
    for name in (*failpoints.PRODUCER, *failpoints.READER)
    if name.startswith(("grow.", "drain.", "give_back."))
)


def cases(names: tuple[str, ...]) -> list[Case]:
    found: list[Case] = [(name, nth, "anywhere") for name in names for nth in TIMES]
    found += [(name, nth, "anywhere") for name in names for nth in (2, 4) if name.startswith("hand_back.")]
    return found + [(name, 1, "beside") for name in names if name in BESIDE]


def case_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Traffic:
    """A producer and its readers, which do everything that they can do, again and again, until one of them dies.

    lossy: no ticket gets to a reader. late: a reader more, which joins and leaves in each round. comes_back: the
    reader that leaves and joins again in each round.
    """

    def __init__(
        self,
        producer: Peer[Producing],
        address: str,
        readers: list[tuple[str, Peer[Reading]]],
        *,
        lossy: bool,
        late: Peer[Reading] | None = None,
        comes_back: Peer[Reading] | None = None,
    ) -> None:
        self.producer, self.address, self.readers = producer, address, readers
        self.lossy, self.late, self.comes_back = lossy, late, comes_back
        self.on_its_way: dict[Peer[Reading], list[Sent]] = {reader: [] for _, reader in readers}
        self.held: dict[Peer[Reading], int] = dict.fromkeys(self.on_its_way, 0)
        self.joined: set[Peer[Reading]] = set()
        self.seeds = count(1)

    def run(self) -> None:
        """Raises Died."""
        for _, reader in self.readers:
            self._joining(reader, Reading.join)
        for number in range(100):
            self._wait_until_it_is_open()
            self._put_and_take(number)
            self._wait_for_the_memory_to_go()
            if self.late is not None:
                self._joining(self.late, Reading.come_back)
                self.late.call(Reading.close)
            if self.comes_back is not None:
                self._joining(self.comes_back, Reading.come_back)
        raise AssertionError("nobody has died in a hundred rounds: no round goes past this point")

    def _joining(self, reader: Peer[Reading], join: Callable[[Reading, str], None]) -> None:
        try:
            reader.call(join, self.address)
        except JoinRefused as error:
            raise Died(self.producer.exitcode()) from error
        self.joined.add(reader)

    def _wait_until_it_is_open(self) -> None:
        """Raises Died where it never will be: a reader can die by itself of what it hears."""

        def is_open() -> bool:
            for reader in self.held:
                if not reader.is_alive():
                    raise Died(reader.exitcode())
            return self.producer.call(Producing.is_open)

        eventually(is_open, "the lane opens")

    def _put_and_take(self, number: int) -> None:
        groups = sorted({group for group, _ in self.readers})
        for at, nbytes in enumerate(SIZES * len(groups)):
            seed = next(self.seeds)
            sent = self.producer.call(Producing.put, seed, nbytes, uses=3)
            again = self.producer.call(Producing.put, seed, nbytes)
            self.producer.call(Producing.forget, seed)
            if self.lossy:
                continue
            to = [reader for group, reader in self.readers if group == groups[at % len(groups)]]
            for reader in to:
                self.on_its_way[reader] += (sent, again)
            for reader in to:
                self.take(reader, MODES[(number + at) % 3])
        if not self.lossy:
            for reader in self.held:  # whatever came last stays on its way to one, while another has let it go
                while self.on_its_way[reader]:
                    self.take(reader, "view")
                assert reader.call(Reading.check) == self.held[reader]
                self.let_go(reader)

    def take(self, reader: Peer[Reading], mode: Mode) -> None:
        """Take the next ticket that is on its way to a reader."""
        reader.call(Reading.take, self.on_its_way[reader][0], mode)
        del self.on_its_way[reader][0]
        self.held[reader] += 1

    def let_go(self, reader: Peer[Reading]) -> None:
        """Let all go that a reader holds."""
        reader.call(Reading.let_go)
        self.held[reader] = 0

    def _wait_for_the_memory_to_go(self) -> None:
        baseline(self.producer)
        eventually(lambda: self.producer.call(Producing.stats).warm == 0, "idle memory goes")

    # --- afterwards ----------------------------------------------------------------------------------------

    def all_arrives(self, reader: Peer[Reading]) -> None:
        """What a reader holds is right, and so is what was on its way to it."""
        assert reader.call(Reading.check) == self.held[reader]
        for mode in MODES * len(self.on_its_way[reader]):
            if self.on_its_way[reader]:
                self.take(reader, mode)
        assert reader.call(Reading.check) == self.held[reader]


def one_that_dies(company: Company, traffic: Traffic, victim: Peer[Any], point: str | None = None) -> None:
    """Go on until the victim is dead, of what it was told to die of, and nobody else."""
    with pytest.raises((Died, AssertionError)) as end:
        traffic.run()
    # A reader can die by itself of what it hears; then it may be a put that tells so first.
    assert isinstance(end.value, Died) or "not_open" in str(end.value)
    assert victim.exitcode() == -signal.SIGKILL
    assert point is None or victim.last_words() == point
    assert all(peer.is_alive() for peer in company.peers if peer is not victim)


def producer_and_readers(company: Company, *, lossy: bool = False) -> Traffic:
    """A lane with two readers of a group, which are yet to join, and one more that comes and goes."""
    producer = company.producer(
        {"tp": 2}, capacity=CAPACITY, segment=SEGMENT, idle=0.1, orphan=0.2 if lossy else FOREVER
    )
    readers = [("tp", company.reader("tp")) for _ in range(2)]
    return Traffic(producer, company.invitation(producer), readers, lossy=lossy, late=company.reader("tp"))


def after_a_producers_death(company: Company, traffic: Traffic) -> None:
    """Readers keep what they hold, get what is on its way, and can join another lane (4)."""
    readers = [reader for _, reader in traffic.readers]
    for reader in readers:
        traffic.all_arrives(reader)
    for reader in readers:
        hears_of_the_end(reader)
    kinds = {trace.kind for trace in kernel.traces([traffic.address], company.files)}
    assert not kinds & {"socket", "file"}

    other = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    for reader in readers:
        reader.call(Reading.join, company.invitation(other))
    carries(other, *readers)
    for reader in readers:
        traffic.all_arrives(reader)
        traffic.let_go(reader)
    baseline(other)


@pytest.mark.parametrize("case", cases(failpoints.PRODUCER), ids=case_id)
def test_a_producer_killed_at(company: Company, case: Case) -> None:
    traffic = producer_and_readers(company, lossy=case[0].startswith("revoke."))
    traffic.producer.arm(case[0], case[1], where=case[2])
    one_that_dies(company, traffic, traffic.producer, case[0])
    after_a_producers_death(company, traffic)


def producer_and_groups(company: Company, groups: tuple[str, ...], *, lossy: bool = False) -> Traffic:
    """A lane with these readers, which are yet to join; the second comes and goes."""
    producer = company.producer(
        {group: groups.count(group) for group in groups},
        capacity=CAPACITY,
        segment=SEGMENT,
        idle=0.1,
        orphan=0.2 if lossy else FOREVER,
    )
    readers = [(group, company.reader(group)) for group in groups]
    return Traffic(producer, company.invitation(producer), readers, lossy=lossy, comes_back=readers[1][1])


def after_a_readers_death(company: Company, traffic: Traffic) -> None:
    """What it held is free, the others notice nothing, and another takes its place (4)."""
    producer, address = traffic.producer, traffic.address
    (file,) = kernel.lane_files(producer.pid)
    survivors = [reader for _, reader in traffic.readers if reader.is_alive()]
    for reader in survivors:
        if reader not in traffic.joined:  # it died before their turn
            reader.call(Reading.join, address)
    eventually(lambda: not producer.call(Producing.is_open), "the lane shuts")
    why = refused(producer)
    assert why.cause == "not_open" and "1 of 2 in 'tp'" in why.detail
    if traffic.lossy:  # what was lost goes first: from now on tickets arrive, however late
        baseline(producer)
        producer.call(Producing.set_orphan, FOREVER)
    for reader in survivors:
        traffic.all_arrives(reader)
        assert reader.call(Reading.lanes) == (address,)

    replacement = company.reader("tp", address)
    assert producer.call(Producing.wait_open)
    carries(producer, survivors[0], replacement)
    for reader in survivors:
        traffic.all_arrives(reader)
        traffic.let_go(reader)
    stats = baseline(producer)
    assert stats.malformed_messages == 0
    eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "idle memory goes")

    other, (another,) = company.open(["tp"])
    survivors[0].call(Reading.join, company.invitation(other))
    carries(other, another, survivors[0])
    baseline(other)


@pytest.mark.parametrize(
    ("case", "groups"),
    [(case, ("tp", "tp")) for case in cases(failpoints.READER)]
    + [
        (case, ("tp", "tp", "vit"))
        for case in cases(failpoints.READER)
        if case[0].startswith(("take.", "give_back.", "revoke."))
    ],
    ids=case_id,
)
def test_a_reader_killed_at(company: Company, case: Case, groups: tuple[str, ...]) -> None:
    traffic = producer_and_groups(company, groups, lossy=case[0].startswith("revoke."))
    _, victim = traffic.readers[1]
    victim.arm(case[0], case[1], where=case[2])
    one_that_dies(company, traffic, victim, case[0])
    after_a_readers_death(company, traffic)


@contextmanager
def killed_after(victim: Peer[Any], seconds: float) -> Iterator[None]:
    """Somewhere in the block, the victim dies."""
    timer = threading.Timer(seconds, os.kill, (victim.pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("seed", range(8))
def test_a_producer_killed_anywhere(company: Company, seed: int) -> None:
    """Between the points, too."""
    traffic = producer_and_readers(company)
    with killed_after(traffic.producer, Random(seed).uniform(0.0, 0.8)):
        one_that_dies(company, traffic, traffic.producer)
    after_a_producers_death(company, traffic)


@pytest.mark.parametrize("seed", range(8))
def test_a_reader_killed_anywhere(company: Company, seed: int) -> None:
    """Between the points, too."""
    traffic = producer_and_groups(company, ("tp", "tp", "vit"))
    with killed_after(traffic.readers[1][1], Random(seed).uniform(0.0, 0.8)):
        one_that_dies(company, traffic, traffic.readers[1][1])
    after_a_readers_death(company, traffic)


@pytest.mark.parametrize("point", ["take.claimed", "take.mapped", "release.queued"])
def test_the_only_reader_of_a_group_killed_at(company: Company, point: str) -> None:
    """Nobody is left who knows whose ticket it was: it is an orphan, since the other group never saw it (3, 4)."""
    producer, (alone, other) = company.open(["tp", "vit"], idle=0.1, orphan=FOREVER)
    alone.arm(point)
    sent = producer.call(Producing.put, 1, 1000)
    with pytest.raises(Died):
        alone.call(Reading.take, sent, "clone")
    assert alone.last_words() == point
    producer.call(Producing.set_orphan, 0.1)
    baseline(producer)
    producer.call(Producing.set_orphan, FOREVER)

    replacement = company.reader("tp", company.invitation(producer))
    assert producer.call(Producing.wait_open)
    carries(producer, replacement)
    carries(producer, other)
    baseline(producer)


@pytest.mark.parametrize("point", failpoints.READER[:5])
def test_a_reader_whose_producer_is_killed_while_it_joins_keeps_nothing(company: Company, point: str) -> None:
    producer = company.producer({"tp": 1})
    address = company.invitation(producer)
    reader = company.reader("tp")
    reader.arm(point, action="stop")
    reader.start(Reading.join, address)
    assert reader.last_words() == point
    reader.wait_stopped()
    producer.kill()
    reader.go_on()
    try:
        reader.answer()
    except JoinRefused as error:
        assert address in str(error)
    else:
        assert point == "join.acknowledged"  # it was in, and learns of the death as any reader does
        hears_of_the_end(reader)
        return
    assert reader.call(Reading.lanes) == ()
    assert not kernel.lane_files(reader.pid)

    other = company.producer({"tp": 1})
    reader.call(Reading.join, company.invitation(other))
    carries(other, reader)
    baseline(other)


@pytest.mark.parametrize("point", failpoints.PRODUCER[5:8])
def test_a_producer_whose_reader_is_killed_while_it_joins_keeps_nothing(company: Company, point: str) -> None:
    producer = company.producer({"tp": 1})
    address = company.invitation(producer)
    reader = company.reader("tp")
    before = len(list(kernel.descriptors(producer.pid)))
    producer.arm(point, action="stop")
    reader.start(Reading.join, address)
    assert producer.last_words() == point
    producer.wait_stopped()
    reader.kill()
    producer.go_on()
    eventually(lambda: len(list(kernel.descriptors(producer.pid))) == before, "what was for the reader is closed")
    stats = producer.call(Producing.stats)
    assert not stats.is_open and stats.readers == {}

    carries(producer, company.reader("tp", address))
    baseline(producer)


def test_all_killed_at_once_leave_nothing(company: Company) -> None:
    """With tensors held, tickets on their way, a reader in mid-join and memory being committed (4)."""
    producer, readers = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT)
    joining = company.reader("tp")
    joining.arm("join.greeted", action="stop")
    joining.start(Reading.join, company.invitation(producer))
    joining.wait_stopped()
    for seed in range(3):
        sent = producer.call(Producing.put, seed, 70_000)
        readers[0].call(Reading.take, sent, "cow")
    assert kernel.traces(company.addresses, company.files)
    for peer in company.peers:
        peer.kill()
    company.nothing_is_left()
