"""Which readers are members of a lane, and when: a lane is open only when every rank has joined it.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from mmlane.lane import Invitation, JoinRefused, Lane, LaneError, Reader, admission, failpoints, protocol, status
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.lane_with_readers import new_tensor, put, serves
from tests.lane.harness.payloads import Sent
from tests.lane.harness.peers import (
    Company,
    Peer,
    Producing,
    Reading,
    baseline,
    carries,
    open_gate,
    refused,
    shut_gate,
    wait_at_gate,
)
from tests.lane.harness.sockets import MAPPED, hello, receive, visit, welcomed
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

JOINING = [point for point in failpoints.READER if point.startswith("join.")]
UNTIL_MAPPED = JOINING[: JOINING.index("join.stored") + 1]  # MAPPED has not been sent
ACCEPTING = [point for point in failpoints.PRODUCER if point.startswith("accept.")]


def joined(producer: Peer[Producing]) -> dict[str, list[int]]:
    return producer.call(Producing.stats).joined


def join_for(reading: Reading, invitation: Invitation, seconds: float) -> None:
    reading.reader.join(invitation, timeout=seconds)


def be_patient(_: Producing, seconds: float) -> None:
    """From now on a process has so long to prove that it is a reader."""
    admission._PATIENCE = seconds


# --- one connection for a number ---------------------------------------------------------------------------


def test_a_second_reader_of_a_living_number_is_refused_with_the_process_that_has_it(company: Company) -> None:
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    first = company.reader("tp", invitation, number=0)
    again = company.reader("tp", number=0)
    with pytest.raises(JoinRefused, match=rf"reader 0 of 'tp' is here already, as process {first.pid}$"):
        again.call(Reading.join, invitation)
    assert joined(producer) == {"tp": [0]}
    assert refused(producer).detail.endswith("have joined; missing: reader 1 of 'tp'")
    second = company.reader("tp", invitation, number=1)
    assert producer.call(Producing.wait_open)
    with pytest.raises(JoinRefused, match=f"as process {first.pid}$"):
        again.call(Reading.join, invitation)
    carries(producer, first, second)
    baseline(producer)


def test_a_reader_that_has_not_mapped_the_memory_yet_has_its_number_too(lane: Lane) -> None:
    with welcomed(lane.invitation), Reader("tp", 0) as reader:
        with pytest.raises(JoinRefused, match=f"reader 0 of 'tp' is here already, as process {os.getpid()}$"):
            reader.join(lane.invitation)
        assert lane.stats().joined == {"tp": []}


@pytest.mark.parametrize("how", ["welcomed", "joined"])
def test_a_number_is_free_again_when_its_connection_has_ended(how: str) -> None:
    """Also where the producer had no time yet to hear of the end: it looks."""
    with Lane({"tp": 2}) as lane:
        before = welcomed(lane.invitation)
        if how == "joined":
            before.send(MAPPED)
            eventually(lambda: lane.stats().joined == {"tp": [0]}, "the first has joined")
        gate = Gate("accept.connected")  # the producer's thread stands still from here on
        connection = visit(lane.name)
        gate.wait()
        connection.send(hello(lane.invitation))
        before.close()
        gate.open()
        (fd,) = receive(connection)[1]
        os.close(fd)
        with connection, Reader("tp", 1) as other:
            connection.send(MAPPED)
            other.join(lane.invitation)
            assert lane.wait_open(DEADLINE)


def test_a_reader_that_is_closed_leaves_its_number_to_the_next_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, and however late its thread comes to it."""

    def join() -> None:
        with pytest.raises(LaneError):
            reader.join(lane.invitation)

    with Lane({"tp": 1}) as lane, Reader("tp", 0) as reader, Reader("tp", 0) as successor:
        gate = Gate("join.stored", where="beside")  # it has not joined: else its end would be the lane's
        with in_a_thread(join):
            gate.wait()
            with monkeypatch.context() as patch:
                patch.setattr(reader._listener, "wake", lambda: None)
                reader.close()
            successor.join(lane.invitation)
            gate.open()
        serves(lane, successor)


def test_only_numbers_that_are_expected_join(lane: Lane) -> None:
    """A rank of a larger engine, of another group, and numbers that are none."""
    for group, number in (("tp", 1), ("tp", 1 << 70), ("pp", 0), ("", 0)):
        with (
            Reader(group, number) as reader,
            pytest.raises(JoinRefused, match=r"is not expected.*reader 0 of 'tp'"),
        ):
            reader.join(lane.invitation)
    with visit(lane.invitation.name) as connection:  # no reader of ours has such a number
        connection.send(hello(lane.invitation, "tp", -1))
        assert "reader -1 of 'tp' is not expected" in protocol.read_reject(receive(connection)[0])
    assert lane.stats().joined == {"tp": []}
    serves(lane)


# --- an open lane is one that every rank has ---------------------------------------------------------------


def test_no_other_process_takes_the_place_of_a_rank(company: Company) -> None:
    """Whatever connects in its place, the lane waits for the rank, and the rank gets every ticket (2, 7)."""
    producer = company.producer({"dp0": 2})
    invitation = company.invitation(producer)
    first = company.reader("dp0", invitation)
    forged = Invitation.make(invitation.name)
    for word in (
        b"\x01\x02\x00dp0",  # the greeting of protocol 2
        hello(forged, "dp0", 1),
        hello(Invitation(invitation.name, bytes(32)), "dp0", 1),
        MAPPED,
    ):
        with visit(invitation.name) as connection:
            connection.send(word)
            answer, fds = receive(connection)
            assert protocol.kind(answer) == protocol.REJECT and not fds
            assert receive(connection) == (b"", [])  # it hangs up
    assert joined(producer) == {"dp0": [0]}
    assert refused(producer).cause == "not_open"
    second = company.reader("dp0", invitation)
    assert producer.call(Producing.wait_open)
    carries(producer, first, second)
    baseline(producer)


@pytest.mark.parametrize("point", JOINING)
def test_a_rank_that_stands_still_while_it_joins_is_waited_for(company: Company, point: str) -> None:
    """Under SIGSTOP at every step. The lane opens when all have it, and both ranks take every ticket."""
    producer = company.producer({"tp": 2})
    producer.call(be_patient, DEADLINE)  # the machine may be slow
    invitation = company.invitation(producer)
    first = company.reader("tp", invitation)
    slow = company.reader("tp")
    slow.arm(point, action="stop")
    slow.start(Reading.join, invitation)
    assert slow.last_words() == point
    slow.wait_stopped()
    sent: Sent | None = None
    if point == "join.acknowledged":
        assert producer.call(Producing.wait_open)
        sent = producer.call(Producing.put, 1, 1000)
    else:
        assert refused(producer).cause == "not_open" and joined(producer) == {"tp": [0]}
    slow.go_on()
    slow.answer()
    assert producer.call(Producing.wait_open)
    if sent is not None:
        for reader in (first, slow):
            reader.call(Reading.let_go, reader.call(Reading.take, sent))
    carries(producer, first, slow)
    stats = baseline(producer)
    assert (stats.joined, stats.rejected_peers, stats.lost_tickets) == ({"tp": [0, 1]}, 0, 0)


def test_a_rank_that_stands_still_before_its_proof_comes_again(company: Company) -> None:
    """It is sent away, and told so; a later join of the same reader succeeds."""
    producer = company.producer({"tp": 1})
    producer.call(be_patient, 0.1)
    invitation = company.invitation(producer)
    slow = company.reader("tp")
    slow.arm("join.connected", action="stop")
    slow.start(Reading.join, invitation)
    assert slow.last_words() == "join.connected"
    slow.wait_stopped()
    eventually(lambda: producer.call(Producing.stats).rejected_peers == 1, "it is sent away")
    slow.go_on()
    with pytest.raises(JoinRefused, match=r"nothing heard for 0\.1 s"):
        slow.answer()
    assert slow.call(Reading.lanes) == ()
    producer.call(be_patient, DEADLINE)
    slow.call(Reading.join, invitation)
    assert producer.call(Producing.wait_open)
    carries(producer, slow)


@pytest.mark.parametrize("point", ACCEPTING)
def test_a_producer_that_stands_still_while_it_accepts_loses_no_reader(company: Company, point: str) -> None:
    """A join that gets no answer may be tried again; after MAPPED the reader waits for nothing."""
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    first = company.reader("tp", invitation)
    second = company.reader("tp")
    producer.arm(point, action="stop")
    second.start(join_for, invitation, 0.3)
    assert producer.last_words() == point
    producer.wait_stopped()
    if point in ("accept.connected", "accept.proven"):
        with pytest.raises(JoinRefused, match=r"no answer within 0\.3 s"):
            second.answer()
        assert second.call(Reading.lanes) == ()
        producer.go_on()
        second.call(Reading.join, invitation)
    else:
        second.answer()
        producer.go_on()
    assert producer.call(Producing.wait_open)
    carries(producer, first, second)
    baseline(producer)


def test_a_join_that_times_out_in_front_of_a_producer_that_stands_still_is_tried_again(company: Company) -> None:
    """Connections of the tries that were given up do no harm: they are closed before the lane can open."""
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    first = company.reader("tp", invitation)
    second = company.reader("tp")
    producer.stop()
    before = len(kernel.descriptors(second.pid))
    for _ in range(3):
        with pytest.raises(JoinRefused, match=r"no answer within 0\.1 s"):
            second.call(join_for, invitation, 0.1)
    assert not kernel.lane_files(second.pid) and len(kernel.descriptors(second.pid)) == before
    second.start(Reading.join, invitation)
    producer.go_on()
    second.answer()
    assert producer.call(Producing.wait_open)
    eventually(lambda: producer.call(Producing.stats).rejected_peers == 3, "the producer sees that they have gone")
    carries(producer, first, second)
    assert baseline(producer).joined == {"tp": [0, 1]}


def hold_the_gil(producing: Producing, milliseconds: int) -> list[bytes]:
    """Let no other thread of the producer run for a while; then put at once, as requests that have waited do."""
    ctypes.PyDLL(None).usleep(milliseconds * 1000)
    tickets = []
    for _ in range(200):
        ticket = producing.lane.put(torch.zeros(1 << 17, dtype=torch.uint8))
        if isinstance(ticket, bytes):
            tickets.append(ticket)
    return tickets


def takes(reading: Reading, tickets: list[bytes]) -> int:
    for ticket in tickets:
        reading.reader.take(ticket, "clone")
    return len(tickets)


@pytest.mark.parametrize("point", ["join.connected", "join.greeted", "join.mapped", "join.acknowledged"])
def test_ranks_never_part_however_long_the_producer_holds_the_gil(company: Company, point: str) -> None:
    """A rank's join times out, or does not; the lane opens with it or waits for it. Every ticket that is ever
    issued can be taken by both ranks."""
    producer = company.producer({"tp": 2}, capacity=64 << 20)
    invitation = company.invitation(producer)
    first = company.reader("tp", invitation)
    second = company.reader("tp")
    for _ in range(3):
        second.arm(point, action="stop")
        second.start(join_for, invitation, 0.2)
        assert second.last_words() == point
        second.wait_stopped()
        producer.start(hold_the_gil, 400)
        second.go_on()
        try:
            second.answer()
            is_joined = True
        except JoinRefused:
            is_joined = False
        tickets = producer.answer()
        second.disarm()
        assert is_joined or not tickets
        if is_joined:
            break
    else:
        second.call(Reading.join, invitation)
    assert producer.call(Producing.wait_open)
    tickets += producer.call(hold_the_gil, 1)
    assert tickets
    assert [reader.call(takes, tickets) for reader in (first, second)] == [len(tickets)] * 2
    baseline(producer)


# --- the end of a member -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", JOINING)
def test_a_reader_that_dies_before_the_lane_is_open_frees_its_number(company: Company, point: str) -> None:
    """At every step of its join; another takes its place."""
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    dying = company.reader("tp", number=0)
    dying.arm(point)
    dying.start(Reading.join, invitation)
    assert dying.last_words() == point
    assert dying.exitcode() == -9
    first = company.reader("tp", invitation, number=0)  # the producer looks for itself whether the other has ended
    second = company.reader("tp", invitation, number=1)
    assert producer.call(Producing.wait_open)
    carries(producer, first, second)
    assert baseline(producer).joined == {"tp": [0, 1]}


@pytest.mark.parametrize("point", ["accept.proven", "accept.welcomed", "accept.joined"])
def test_a_reader_that_dies_while_it_is_accepted_frees_its_number(company: Company, point: str) -> None:
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    dying = company.reader("tp", number=0)
    producer.call(shut_gate, point)
    dying.start(Reading.join, invitation)
    producer.call(wait_at_gate)
    dying.kill()
    producer.call(open_gate)
    first = company.reader("tp", invitation, number=0)
    second = company.reader("tp", invitation, number=1)
    assert producer.call(Producing.wait_open)
    carries(producer, first, second)
    assert baseline(producer).joined == {"tp": [0, 1]}


def test_with_its_first_member_an_open_lane_ends_for_ever(company: Company) -> None:
    """No ticket is issued any more, what is out is not used again, and no reader can join (2, 4)."""
    producer, (first, second) = company.open(["tp", "tp"])
    invitation = company.invitation(producer)
    sent = producer.call(Producing.put, 1, 1000)
    second.kill()
    eventually(lambda: not producer.call(Producing.is_open), "the lane ends")
    assert (refused(producer).cause, refused(producer).detail) == ("closed", "reader 1 of 'tp' has ended")
    late = company.reader("tp", number=1)
    with pytest.raises(JoinRefused, match="no process listens there"):
        late.call(Reading.join, invitation)
    with pytest.raises(status.StatusError, match="no process listens there"):
        status.ask(invitation.name)
    first.call(Reading.take, sent)
    assert first.call(Reading.check) == 1
    first.call(Reading.let_go)


def test_waiting_for_a_lane_ends_with_the_lane() -> None:
    with Lane({"tp": 1}) as lane:
        answers: list[bool] = []
        with in_a_thread(lambda: answers.append(lane.wait_open(DEADLINE))):
            eventually(lambda: len(lane._lifecycle._waiting) == 1, "the thread waits")
            lane.close()
        assert answers == [False]


def test_a_reader_that_is_closed_while_it_joins_is_no_member(lane: Lane) -> None:
    gate = Gate("join.mapped")

    def join() -> None:
        with pytest.raises(LaneError, match="this reader is closed"):
            reader.join(lane.invitation)

    with Reader("tp") as reader:
        with in_a_thread(join):
            gate.wait()
            reader.close()
            gate.open()
        eventually(lambda: lane.is_closed or has_no_member(lane), "the lane hears of its end")


def has_no_member(lane: Lane) -> bool:
    return lane.stats().joined == {"tp": []}


def test_a_lane_can_be_joined_again_after_it_was_joined(lane: Lane) -> None:
    """Which does nothing: the engine's ranks hear of the lane with every request."""
    with Reader("tp") as reader:
        for _ in range(3):
            reader.join(lane.invitation)
        assert reader.lanes() == (lane.name,)
        assert lane.wait_open(DEADLINE)
        tensor = new_tensor()
        assert torch.equal(reader.take(put(lane, tensor)), tensor)
        assert lane.stats().rejected_peers == 0
