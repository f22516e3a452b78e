"""Both ends of a lane as the engine's processes get and lose them, and what they do when one cannot be had."""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane import log  # noqa: E402
from mmlane.engine.topology import RankPlace  # noqa: E402
from mmlane.lane import Invitation, Lane, LaneUnavailable, Reader, cuda, memory, status  # noqa: E402
from mmlane.transport import scheduler_side, tokenizer_side  # noqa: E402
from mmlane.transport.base import Declined, Here, Scheduler, Tokenizer  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.inline import SMALL  # noqa: E402
from mmlane.transport.lane import LaneTransport, Producer, Ticket  # noqa: E402
from mmlane.transport.pointer import slot  # noqa: E402
from mmlane.transport.rank import RETRY_S, Rank  # noqa: E402
from mmlane.transport.samples import Samples  # noqa: E402
from mmlane.transport.segment import Segment  # noqa: E402
from mmlane.transport.tokenizer_side import SIDE, TokenizerSide  # noqa: E402
from mmlane_patches import lane as patch  # noqa: E402
from tests.lane.harness.child import run  # noqa: E402
from tests.lane.harness.confinement import limit_address_space  # noqa: E402
from tests.lane.harness.fake_cuda import FakeGpu  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402
from tests.unit.launches import launched  # noqa: E402

MIB = 1 << 20
NOWHERE = Invitation.make("mmlane-1-00000000")


class Manager:
    """A tokenizer manager."""

    def __init__(self, **model: bool) -> None:
        self.model_config = SimpleNamespace(**(model or {"is_multimodal": True}))


def start(manager: Manager, server_args: Any, *, capacity: int | None = 8 * MIB, pinned: int = 0) -> TokenizerSide:
    """What a manager's process does once it is made."""
    tokenizer_side.start(manager, server_args, capacity=capacity, pinned=pinned, mode="lane")
    return side(manager)


def side(manager: Manager) -> TokenizerSide:
    found = getattr(manager, SIDE)
    assert isinstance(found, TokenizerSide)
    return found


def producer_of(manager: Manager) -> Producer:
    producer = side(manager).producer
    assert producer is not None
    return producer


def become_rank(
    server_args: Any, dp_rank: int | None, pp_rank: int, tp_rank: int, *, pinned: int = 1 << 30
) -> Rank:
    """What a scheduler's process does once it is made; the rank that it then is."""
    scheduler_side.start(None, server_args, RankPlace(dp_rank, pp_rank, tp_rank), capacity=None, pinned=pinned)
    return this_rank()


def this_rank() -> Rank:
    assert slot.scheduler is not None and slot.chain is slot.scheduler.chain
    lane = slot.chain.find(LaneTransport)
    assert isinstance(lane, LaneTransport) and lane.rank is not None
    return lane.rank


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "scheduler", None)
    monkeypatch.setattr(slot, "chain", Chain(Here()))
    monkeypatch.setattr(log, "_said", set())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mmlane" and r.levelno == logging.WARNING]


# --- a process becomes one end ------------------------------------------------------------------------------

RUNTIME = "sglang.srt.runtime_context"

RanksPlace = tuple[str, int | None]  # group and number


def place(rank: Rank) -> RanksPlace:
    return rank._here.group, rank._here.number


class SchedulerOf0520:
    """Its arguments, up to that release."""

    def __init__(
        self,
        server_args: Any,
        port_args: Any,
        gpu_id: int,
        tp_rank: int,
        moe_ep_rank: int,
        pp_rank: int,
        attn_cp_rank: int,
        moe_dp_rank: int,
        dp_rank: int | None,
    ) -> None:
        pass


class SchedulerOf0521:
    """Its arguments from that release on: the ranks are in the context."""

    def __init__(self, server_args: Any, port_args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("dp_rank", "pp_rank", "tp_rank", "wanted"),
    [(1, 0, 1, ("dp1", 1)), (1, 1, 1, ("dp1", None)), (0, 0, 0, ("dp0", 0))],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_scheduler_becomes_a_rank_however_it_is_told_which(
    by_name: bool, dp_rank: int, pp_rank: int, tp_rank: int, wanted: RanksPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_args = launched(tp_size=2, dp_size=2)
    init: Any = patch._scheduler(SchedulerOf0520.__init__)
    before = SchedulerOf0520.__new__(SchedulerOf0520)
    if by_name:
        ranks = {"tp_rank": tp_rank, "pp_rank": pp_rank, "dp_rank": dp_rank}
        init(before, server_args, None, gpu_id=7, moe_ep_rank=7, attn_cp_rank=7, moe_dp_rank=7, **ranks)
    else:
        init(before, server_args, None, 7, tp_rank, 7, pp_rank, 7, 7, dp_rank)
    assert place(this_rank()) == wanted
    monkeypatch.setattr(slot, "scheduler", None)
    context = ModuleType(RUNTIME)
    parallel = SimpleNamespace(dp_rank=dp_rank, pp_rank=pp_rank, tp_rank=tp_rank)
    vars(context)["get_parallel"] = lambda: parallel
    monkeypatch.setitem(sys.modules, RUNTIME, context)
    init = patch._scheduler(SchedulerOf0521.__init__)
    init(SchedulerOf0521.__new__(SchedulerOf0521), server_args, None)
    assert place(this_rank()) == wanted


@pytest.mark.parametrize(("said", "writable"), [("", False), ("64", False), ("0", True)])
def test_a_scheduler_does_what_the_user_says_of_pinned_memory(
    said: str, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLANE_PINNED_MB", said)
    init: Any = patch._scheduler(SchedulerOf0520.__init__)
    init(SchedulerOf0520.__new__(SchedulerOf0520), launched(), None, 7, 0, 7, 0, 7, 7, None)
    assert this_rank()._here.writable is writable


def test_a_later_pipeline_stage_never_joins(opening: Opening) -> None:
    """It hears of the lane when the first stage passes a message on; joining would cost the lane a member."""
    later = become_rank(launched(pp_size=2), None, 1, 0)
    slot.chain.join(bytes(opening.begin()))
    assert threads("mmlane-joining") == [] and later._reader is None
    later.release(b"what it cannot have")
    opening.join()
    assert opening.lane.is_open and opening.lane.stats().rejected_peers == 0


@pytest.mark.parametrize(
    ("value", "ranks", "said"),
    [
        ("1", (None, 0, 0), 1),
        ("true", (0, 0, 0), 1),
        ("1", (1, 0, 0), 0),
        ("1", (0, 1, 0), 0),
        ("1", (0, 0, 1), 0),
        ("0", (0, 0, 0), 0),
    ],
)
def test_one_rank_says_that_the_rust_server_has_no_lane(
    value: str,
    ranks: tuple[int | None, int, int],
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", value)
    become_rank(launched(dp_size=2), *ranks)
    assert len(warnings(caplog)) == said


def test_what_is_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    elastic = launched(elastic_ep_backend="mooncake")
    assert start(Manager(is_multimodal=False), elastic).producer is None
    assert warnings(caplog) == []  # who sends no images need not know
    without = start(Manager(), elastic)
    assert without.producer is None
    (line,) = warnings(caplog)
    assert "--elastic-ep-backend" in line and "MMLANE=backport silences this" in line
    tensor = torch.ones(SMALL + 1, dtype=torch.uint8)
    payload, invitation = without.chain.offer(tensor)
    assert isinstance(payload, Segment) and invitation is None  # as without mmlane's lanes
    payload.release()


@pytest.mark.parametrize(("workers", "share"), [(0, 1), (1, 1), (4, 4)])
def test_tokenizer_workers_share_the_capacity(workers: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "default_capacity", lambda: 400 * MIB)
    server_args = launched(tp_size=2, tokenizer_worker_num=workers)
    manager, with_a_wish = Manager(), Manager()
    start(manager, server_args, capacity=None)
    start(with_a_wish, server_args, capacity=8 * MIB)
    for owner, capacity in ((manager, 400 * MIB // share), (with_a_wish, 8 * MIB)):  # a wish is for each
        producer = producer_of(owner)
        answer = producer.put(torch.ones(9))
        lane = producer.lane
        assert lane is not None and answer == Declined("not_open", bytes(lane.invitation))
        assert lane.stats().capacity_bytes == capacity and lane.expected == {"dp0": 2}
        lane.close()


class TokenizerManager(Manager):
    """The arguments that it is made with."""

    def __init__(self, server_args: Any, port_args: Any) -> None:
        super().__init__()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("device", "workers", "wish", "pinned"),
    [
        ("cuda", 0, None, 1024),
        ("cuda", 1, None, 1024),
        ("cuda", 4, None, 256),
        ("cuda", 4, 64, 64),
        ("cuda", 1, 0, 0),
        ("cpu", 1, None, 0),
    ],
)
def test_what_a_lane_keeps_for_gpus(
    device: str, workers: int, wish: int | None, pinned: int, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, Any] = {}

    def refuse(readers: dict[str, int], **options: Any) -> None:
        opened.update(options)
        raise LaneUnavailable("only asked")

    monkeypatch.setattr("mmlane.transport.lane.Lane", refuse)
    monkeypatch.setenv("MMLANE_PINNED_MB", "" if wish is None else str(wish))
    monkeypatch.setenv("MMLANE_CAPACITY_MB", "2400")
    init: Any = patch._tokenizer(TokenizerManager.__init__)
    manager = TokenizerManager.__new__(TokenizerManager)
    server_args = launched(device=device, tokenizer_worker_num=workers)
    if by_name:
        init(manager, port_args=None, server_args=server_args)
    else:
        init(manager, server_args, None)
    assert producer_of(manager).put(torch.ones(9)) == Declined("unavailable")
    assert (opened["pinned"], opened["capacity"]) == (pinned * MIB, 2400 * MIB)


def test_a_process_that_cannot_be_given_its_side_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("mine")

    before = log.failures["start"]
    monkeypatch.setattr(tokenizer_side, "start", fails)
    init: Any = patch._tokenizer(TokenizerManager.__init__)
    init(TokenizerManager.__new__(TokenizerManager), launched(), None)
    monkeypatch.setattr(scheduler_side, "start", fails)
    init = patch._scheduler(SchedulerOf0521.__init__)
    monkeypatch.setitem(sys.modules, RUNTIME, ModuleType(RUNTIME))
    vars(sys.modules[RUNTIME])["get_parallel"] = lambda: SimpleNamespace(dp_rank=None, pp_rank=0, tp_rank=0)
    init(SchedulerOf0521.__new__(SchedulerOf0521), launched(), None)
    assert slot.scheduler is None
    assert log.failures["start"] == before + 2
    (line,) = warnings(caplog)  # one cause, whichever of the two says it
    assert line.startswith("mmlane: start failed: ZeroDivisionError: mine; this tokenizer has no lane")


@pytest.mark.parametrize(("pinned", "writable"), [(64 * MIB, False), (0, True)])
def test_a_rank_on_cuda(pinned: int, writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes views, on the device that its scheduler has set; without pinned memory, what can be written to."""
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "Cuda", gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    rank = become_rank(launched(device="cuda"), None, 0, 0, pinned=pinned)
    producer = Producer(Tokenizer({"dp0": 1}, 8 * MIB, pinned=pinned))
    answer = producer.put(torch.ones(9))
    assert isinstance(answer, Declined) and answer.invitation is not None
    slot.chain.join(answer.invitation)
    lane = producer.lane
    assert lane is not None and lane.wait_open(DEADLINE) and rank._reader is not None
    assert rank._reader.wait_pinned(lane.name, DEADLINE if pinned != 0 else 0) is (not writable)
    ticket = sent(producer.put(torch.ones(9)))
    assert gpu.index == 3
    taken = rank.take(ticket)
    assert torch.equal(taken, torch.ones(9))
    (start, nbytes), *_ = [*gpu.registered.items(), (0, 0)]
    assert (start <= taken.data_ptr() < start + nbytes) is not writable
    if writable:
        taken += 1
    rank._reader.close()
    lane.close()


def test_a_rank_on_a_cpu_has_no_device() -> None:
    assert become_rank(launched(), None, 0, 0)._here.device is None


@pytest.fixture(params=[False, True], ids=["without metrics", "with metrics"])
def enable_metrics(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways to launch; with metrics, a thread counts lanes and has to let go of them, too."""
    enabled: bool = request.param
    if not enabled:
        yield enabled
        return
    from mmlane.transport import metrics

    monkeypatch.setattr(metrics, "PERIOD_S", 0.01)
    monkeypatch.setattr(metrics, "_meters", set())
    yield enabled
    eventually(lambda: threads("mmlane-metrics") == [], "the thread's end")
    assert metrics._meters == set()


def test_a_lane_ends_with_its_manager(enable_metrics: bool) -> None:
    one, other = Manager(), Manager()  # two engines in one process
    for manager in (one, other):
        start(manager, launched(enable_metrics=enable_metrics))
        producer_of(manager).put(torch.ones(9))
    first, second = (producer_of(manager).lane for manager in (one, other))
    assert first is not None and second is not None
    gone = [weakref.ref(held) for held in (one, side(one), producer_of(one))]
    with Reader("dp0") as reader:
        reader.join(first.invitation, DEADLINE)
        reader.join(second.invitation, DEADLINE)
        announcing()
        del one, manager
        gc.collect()
        assert [held() for held in gone] == [None] * len(gone)
        eventually(lambda: first.is_closed, "the lane's end")  # a thread closes it
        assert not second.is_closed
        del other
        gc.collect()
        eventually(lambda: second.is_closed, "the other lane's end")


def test_a_lane_that_is_opening_ends_with_its_manager(enable_metrics: bool) -> None:
    """The thread that waits for it to open does not keep it alive."""
    manager = Manager()
    start(manager, launched(enable_metrics=enable_metrics))
    producer_of(manager).put(torch.ones(9))
    lane = producer_of(manager).lane
    assert lane is not None and lane.state == "waiting"
    gone = [weakref.ref(held) for held in (manager, side(manager), producer_of(manager))]
    del manager
    gc.collect()
    assert [held() for held in gone] == [None] * len(gone)
    eventually(lambda: lane.is_closed, "the lane's end")
    announcing()


def test_a_manager_that_sent_nothing_leaves_nothing(enable_metrics: bool) -> None:
    manager = Manager()
    start(manager, launched(enable_metrics=enable_metrics))
    gone = [weakref.ref(held) for held in (manager, side(manager), producer_of(manager))]
    del manager
    gc.collect()
    assert [held() for held in gone] == [None] * len(gone)


# --- a producer ---------------------------------------------------------------------------------------------


def sent(answer: Ticket | Declined) -> bytes:
    """A ticket that is on its way: what carried it may go, and is not what releases it."""
    assert isinstance(answer, Ticket)
    ticket: bytes = answer.state()["ticket"]
    return ticket


class Opening:
    """A producer and what it needs readers for."""

    def __init__(self, readers: int = 1, capacity: int = 8 * MIB) -> None:
        side = TokenizerSide(Tokenizer({"dp0": readers}, capacity))
        assert side.producer is not None
        self.chain, self.producer = side.chain, side.producer
        self.readers: list[Reader] = []

    @property
    def lane(self) -> Lane:
        assert self.producer.lane is not None
        return self.producer.lane

    def begin(self) -> Invitation:
        """What the first feature's readers get."""
        answer = self.producer.put(torch.ones(9))
        assert answer == Declined("not_open", bytes(self.lane.invitation))
        return self.lane.invitation

    def send(self, tensor: Any = None, samples: Samples | None = None) -> bytes:
        """A ticket as it travels."""
        return sent(self.producer.put(torch.ones(9) if tensor is None else tensor, samples))

    def join(self) -> None:
        """One reader more, with the next number; the producer knows of it when this returns."""
        number = len(self.readers)
        self.readers.append(Reader("dp0", number))
        self.readers[-1].join(self.lane.invitation, DEADLINE)
        eventually(lambda: number in self.lane.stats().joined["dp0"], "the producer hears of it")

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        if self.producer.lane is not None:
            self.producer.lane.close()
            announcing()


def test_nothing_raises_into_the_engine(
    opening: Opening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opening.begin()
    opening.join()
    opening.lane.wait_open(DEADLINE)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("mine")

    tensor = torch.ones(SMALL)
    monkeypatch.setattr(Lane, "put", fails)
    before = log.failures["put"]
    payload, invitation = opening.chain.offer(tensor)
    assert isinstance(payload, Segment) and invitation is None
    assert log.failures["put"] == before + 1
    assert "put failed: ZeroDivisionError: mine; the feature goes by a shared-memory segment" in caplog.text
    payload.release()
    monkeypatch.undo()
    payload, invitation = opening.chain.offer(tensor)
    assert isinstance(payload, Ticket) and invitation is None
    payload.release()
    assert log.failures["put"] == before + 1
    monkeypatch.setattr(Reader, "join", fails)
    rank = become_rank(launched(), None, 0, 0)
    rank.notice(opening.lane.invitation)
    eventually(lambda: any("join failed: ZeroDivisionError" in line for line in warnings(caplog)), "a line")
    joining()


def test_a_ticket_that_cannot_be_given_a_payload_is_void(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening.begin()
    opening.join()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("mmlane.transport.lane.Ticket", fails)
    with pytest.raises(MemoryError):
        opening.producer.put(torch.ones(9))
    assert opening.lane.stats().puts == 1 and opening.lane.stats().tickets == 0


# --- the samples of one request -----------------------------------------------------------------------------


def used(opening: Opening) -> int:
    return opening.lane.stats().used_bytes


def test_samples_share_one_copy_that_outlives_the_first_answer(opening: Opening) -> None:
    opening.begin()
    opening.join()
    (reader,) = opening.readers
    tensor = torch.arange(30_000)
    together = Samples(4)
    for _ in range(4):
        ticket = opening.send(tensor, together)
        assert torch.equal(reader.take(ticket, "clone"), torch.arange(30_000))  # which releases it
    assert (opening.lane.stats().copied_bytes, opening.lane.stats().shared) == (tensor.nbytes, 3)
    assert used(opening) == 0  # also while the request goes on
    ticket = opening.send(tensor, together)  # the same tensor for another prompt of the request
    tensor.numpy().fill(7)
    other = opening.send(torch.zeros(30_000), together)
    for each in (ticket, other):
        reader.discard(each)
    eventually(lambda: opening.lane.stats().tickets == 0, "the release of both")
    assert used(opening) > 0
    together.close()
    assert used(opening) == 0


@pytest.mark.parametrize("requests", [1, 3])
def test_a_tensor_in_several_places_is_copied_once(opening: Opening, requests: int) -> None:
    """The engine has what it cannot split in each of a request's items."""
    opening.begin()
    opening.join()
    (reader,) = opening.readers
    tensor, other = torch.arange(30_000), torch.ones(30_000)
    together = Samples(requests)
    tickets = []
    for _ in range(requests):
        together.expect([tensor, other, tensor])
        tickets += [opening.send(each, together) for each in (tensor, other, tensor)]
    assert opening.lane.stats().copied_bytes == tensor.nbytes + other.nbytes
    for ticket in tickets:
        reader.discard(ticket)
    eventually(lambda: used(opening) == 0, "the release of all, without the end of the request")


def test_a_copy_is_not_kept_for_a_request_that_went_another_way(opening: Opening) -> None:
    """As the one does that warms the prefix, while the lane is not open."""
    tensor = torch.arange(30_000)
    together = Samples(3)
    together.expect([tensor])
    opening.begin()
    opening.join()
    tickets = []
    for _ in range(2):
        together.expect([tensor])
        tickets.append(opening.send(tensor, together))
    assert opening.lane.stats().copied_bytes == tensor.nbytes
    for ticket in tickets:
        opening.readers[0].discard(ticket)
    eventually(lambda: used(opening) == 0, "the release of both, without the end of the request")


def test_a_tensor_that_is_refilled_for_the_next_request_is_copied_again(opening: Opening) -> None:
    opening.begin()
    opening.join()
    (reader,) = opening.readers
    tensor = torch.zeros(30_000)
    for number in range(3):
        tensor.numpy().fill(number)
        ticket = opening.send(tensor)
        assert torch.equal(reader.take(ticket, "clone"), torch.full((30_000,), float(number)))


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def announcing() -> None:
    """Wait until producers have said what they have to say of their lanes' opening."""
    for thread in threads("mmlane-lane"):
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.fixture
def opening() -> Iterator[Opening]:
    opening = Opening()
    yield opening
    opening.close()


def test_the_line_when_it_opens(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmlane")
    opening.begin()
    assert opening.begin() == opening.lane.invitation  # still
    opening.join()
    announcing()
    (line,) = [r.getMessage() for r in caplog.records if "the lane is open" in r.getMessage()]
    assert line.startswith("mmlane: the lane is open: 1 readers, 0.0 GiB of room, ")
    assert warnings(caplog) == []
    assert torch.equal(opening.readers[0].take(opening.send()), torch.ones(9))


class Said(logging.Handler):
    """Sets an event when a line with a certain text is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.count = 0
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.count += 1
            self.event.set()


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    said = Said("the lane has not opened within")
    logging.getLogger("mmlane").addHandler(said)
    monkeypatch.setattr("mmlane.transport.lane.OPENING_S", 0.0)
    yield said
    logging.getLogger("mmlane").removeHandler(said)


def test_the_line_when_it_does_not_open(
    opening: Opening, unopened: Said, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mmlane")
    opening.begin()
    assert unopened.event.wait(DEADLINE)
    opening.join()  # late is better than never
    announcing()
    assert unopened.count == 1
    late, opened = (r.getMessage() for r in caplog.records if r.name == "mmlane")
    assert "not all of its 1 readers" in late and "`mmlane status`" in late and "the lane is open" in opened


def test_no_thread_waits_for_a_lane_that_is_closed(opening: Opening, unopened: Said) -> None:
    opening.begin()
    assert unopened.event.wait(DEADLINE)
    opening.lane.close()
    announcing()
    assert opening.producer.put(torch.ones(9)) == Declined("closed")


@pytest.mark.parametrize(
    ("cause", "too_large"), [("oversize", 9 * MIB), ("full", 5 * MIB)], ids=["oversize", "full"]
)
def test_a_tensor_that_has_no_place(
    opening: Opening, cause: str, too_large: int, caplog: pytest.LogCaptureFixture
) -> None:
    opening.begin()
    opening.join()
    kept = torch.ones(5 * MIB, dtype=torch.uint8)
    held = opening.send(kept)
    for _ in range(2):
        assert opening.producer.put(torch.zeros(too_large, dtype=torch.uint8)) == Declined(cause)
    (line,) = warnings(caplog)
    assert f"the lane has no place for a feature ({cause})" in line and "shared-memory segment" in line
    assert opening.lane.stats().fallbacks[cause] == 2  # type: ignore[index]
    small = opening.send()
    for ticket in (held, small):
        opening.readers[0].discard(ticket)


def test_one_line_for_each_cause(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    opening.begin()
    opening.join()
    assert opening.producer.put(torch.zeros(9 * MIB, dtype=torch.uint8)) == Declined("oversize")
    assert opening.producer.put(torch.eye(3).to_sparse()) == Declined("unsupported")
    opening.lane.close()
    for _ in range(2):
        assert opening.producer.put(torch.ones(9)) == Declined("closed")
    assert [line.partition("(")[2].partition(")")[0] for line in warnings(caplog)] == [
        "oversize",
        "unsupported",
        "closed",
    ]


def state(opening: Opening) -> str:
    return opening.producer.state


def test_a_lane_that_is_switched_off_and_on_again(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    """While it is off, features go another way, and the ranks stay members; what was out before can be taken."""
    opening.begin()
    opening.join()
    before = opening.send()
    status.switch(opening.lane.name, off=True)
    for _ in range(2):
        assert opening.producer.put(torch.ones(9)) == Declined("off")
    assert state(opening) == "off" and opening.lane.stats().fallbacks["off"] == 2
    (line,) = warnings(caplog)
    assert "(off)" in line and "`mmlane on`" in line and "shared-memory segment" in line
    assert torch.equal(opening.readers[0].take(before), torch.ones(9))
    status.switch(opening.lane.name, off=False)
    ticket = opening.send()
    assert state(opening) == "open"
    assert torch.equal(opening.readers[0].take(ticket), torch.ones(9))
    status.switch(opening.lane.name, off=True)
    assert opening.producer.put(torch.ones(9)) == Declined("off")
    assert len(warnings(caplog)) == 1


def test_a_lane_that_is_switched_off_before_it_opens_sends_no_invitation_until_it_is_on(opening: Opening) -> None:
    opening.begin()
    status.switch(opening.lane.name, off=True)
    assert opening.producer.put(torch.ones(9)) == Declined("off") and state(opening) == "off"
    status.switch(opening.lane.name, off=False)
    opening.begin()
    assert state(opening) == "opening"


def test_a_ticket_that_was_not_sent_is_void(opening: Opening) -> None:
    opening.begin()
    opening.join()
    dropped, released, put = (opening.producer.put(torch.ones(9)) for _ in range(3))
    assert isinstance(dropped, Ticket) and isinstance(released, Ticket) and isinstance(put, Ticket)
    assert opening.lane.stats().tickets == 3
    released.release()
    assert opening.lane.stats().tickets == 2
    opening.producer.release(put.ticket, sent=False)
    assert opening.lane.stats().tickets == 1
    del dropped
    assert opening.lane.stats().tickets == 0


def test_a_ticket_that_was_sent_is_released_by_its_reader_or_recalled(opening: Opening) -> None:
    opening.begin()
    opening.join()
    ticket = opening.send()  # and what carried it has gone
    assert opening.lane.stats().tickets == 1
    assert torch.equal(opening.readers[0].take(ticket), torch.ones(9))
    eventually(lambda: opening.lane.stats().tickets == 0, "its release")
    unread = opening.producer.put(torch.ones(9))
    sent(unread)
    assert isinstance(unread, Ticket)
    unread.release()
    opening.lane.housekeeping.look()  # which is done once a period
    eventually(lambda: opening.lane.stats().lost_tickets == 1, "no reader has seen the ticket")
    assert opening.lane.stats().tickets == 0


@pytest.mark.parametrize("capacity", [99_999_999_999 * MIB, 1 << 63, 1 << 64, 10**40])
def test_a_lane_that_cannot_be_had_is_said_at_start_and_only_then(
    capacity: int, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager()
    start(manager, launched(), capacity=capacity)
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: no lane here: ") and "shared-memory segments instead" in line
    assert f"MMLANE_CAPACITY_MB (here {capacity // MIB})" in line
    producer = producer_of(manager)
    assert producer.state == "failed"
    assert producer.put(torch.ones(9)) == Declined("unavailable")
    assert len(warnings(caplog)) == 1


def test_a_lane_that_was_not_made_for_any_other_reason_has_failed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def lane(*arguments: Any, **options: Any) -> Lane:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("mmlane.transport.lane.Lane", lane)
    producer = Producer(Tokenizer({"dp0": 1}, 8 * MIB))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        producer.put(torch.ones(9))
    assert producer.state == "failed" and producer.lane is None
    assert producer.put(torch.ones(9)) == Declined("unavailable")


def test_a_text_only_model_has_no_lane_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager(is_multimodal=False)
    start(manager, launched(), capacity=1 << 62)
    assert warnings(caplog) == [] and producer_of(manager).state == "unused"


def test_a_model_that_does_not_say_what_it_is_may_be_multimodal(caplog: pytest.LogCaptureFixture) -> None:
    start(Manager(is_generation=True), launched(), capacity=1 << 62)
    assert len(warnings(caplog)) == 1


def test_trying_a_capacity_leaves_no_mapping_and_no_descriptor(caplog: pytest.LogCaptureFixture) -> None:
    def held() -> set[str]:
        """Inodes of what is mapped or open; those of lanes that other tests had may still go."""
        mapped = re.findall(r"(\d+) +/memfd:mmlane", Path("/proc/self/maps").read_text())
        opened = [file for file in [*Path("/proc/self/fd").iterdir()] if file.exists()]  # not the listing's own
        return {*mapped, *(str(file.stat().st_ino) for file in opened if "memfd:mmlane" in str(file.readlink()))}

    with Lane({"dp0": 1}, capacity=8 * MIB):
        assert held()  # it is seen
    before = held()
    manager = Manager()
    start(manager, launched())
    assert warnings(caplog) == [] and producer_of(manager).state == "unused"
    assert held() <= before


@pytest.mark.parametrize(
    ("options", "state"),
    [({}, "unused"), ({"nnodes": 2, "tp_size": 2}, "unused"), ({"elastic_ep_backend": "nixl"}, "off")],
)
def test_metrics_begin_at_start(options: dict[str, Any], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlane.transport.metrics import Meter

    found: list[tuple[str, str]] = []
    monkeypatch.setattr(Meter, "begin", lambda self, state, mode: found.append((state(), mode)))
    start(Manager(), launched(**options))
    assert found == []
    start(Manager(), launched(enable_metrics=True, **options))
    assert found == [(state, "lane")]
    monkeypatch.setenv("MMLANE", "backport")
    init: Any = patch._tokenizer(TokenizerManager.__init__)
    init(TokenizerManager.__new__(TokenizerManager), launched(enable_metrics=True, **options), None)
    assert found[1:] == [(state, "backport")]


def in_metrics(name: str, **labels: str) -> float:
    from mmlane.transport import metrics

    return metrics.REGISTRY.get_sample_value(f"mmlane_{name}", labels) or 0.0


@pytest.mark.parametrize("enable_metrics", [True], indirect=True)
def test_metrics_that_cannot_begin_stop_nothing(
    enable_metrics: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the lane either, which is in /metrics as soon as that can be."""
    from mmlane.transport import metrics

    class Full:
        """Stands in for a metric whose file cannot grow."""

        def labels(self, *values: str) -> None:
            raise ValueError("Duplicated timeseries")

    with monkeypatch.context() as full:
        full.setattr(metrics, "INFO", Full())
        manager = Manager()
        start(manager, launched(enable_metrics=True))
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: metrics failed: ValueError: Dup") and "not in /metrics" in line
    producer_of(manager).put(torch.ones(9))
    eventually(lambda: in_metrics("lane_bytes", kind="capacity") == 8 * MIB, "the lane's numbers")
    caplog.clear()  # the error in it holds who could not begin
    del manager


@pytest.mark.parametrize("enable_metrics", [True], indirect=True)
def test_metrics_that_cannot_be_had_at_start_stop_nothing(
    enable_metrics: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, once; the lane is in /metrics as soon as that can be."""
    from mmlane.transport import metrics

    def meter(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(metrics, "Meter", meter)
        manager = Manager()
        start(manager, launched(enable_metrics=True))
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: metrics failed: OSError: [Errno 28] No sp") and "not in /metrics" in line
    before = in_metrics("fallbacks_total", cause="not_open")
    producer_of(manager).put(torch.ones(9))
    lane = producer_of(manager).lane
    assert lane is not None
    eventually(lambda: in_metrics("lanes", state="opening") == 1, "the tokenizer and its lane are in the numbers")
    lane.close()
    announcing()
    metrics.write()
    assert in_metrics("fallbacks_total", cause="not_open") == before + 1
    assert in_metrics("lanes", state="failed") == 1 and in_metrics("lanes", state="off") == 0
    caplog.clear()
    del manager


def test_a_lane_that_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    producer = Producer(Tokenizer({"dp0": 1}, 1 << 62))
    for _ in range(2):
        assert producer.put(torch.ones(9)) == Declined("unavailable")
    for was_sent in (False, True):
        producer.release(b"no ticket at all", sent=was_sent)
    assert producer.lane is None
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: no lane here: ") and "shared-memory segments instead" in line


def confined() -> tuple[list[Ticket | Declined], list[str]]:
    """In a process that may have no more address room."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mmlane").addHandler(handler)
    limit_address_space(256 * MIB)
    producer = Producer(Tokenizer({"dp0": 1}, 1 << 30))
    return [producer.put(torch.ones(9)) for _ in range(2)], lines


def test_a_process_without_address_room_goes_on() -> None:
    found, lines = run(confined)
    assert found == [Declined("unavailable")] * 2
    (line,) = lines
    assert "no lane here" in line and "ulimit -v" in line


def in_a_child() -> tuple[bool, bool]:
    """Whether a forked child gets nothing, and its parent goes on; called in a process of its own."""
    opening = Opening()
    opening.begin()
    opening.join()
    unsent = opening.producer.put(torch.ones(9))
    assert isinstance(unsent, Ticket)
    ticket = unsent.ticket
    pid = os.fork()
    if pid == 0:
        there = opening.producer
        for was_sent in (False, True):
            there.release(ticket, sent=was_sent)  # is its parent's
        unsent.release()
        os._exit(0 if there.put(torch.ones(9)) == Declined("unavailable") and there.lane is None else 1)
    nothing = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    here = torch.equal(opening.readers[0].take(ticket), torch.ones(9))
    sent(unsent)
    opening.close()
    return nothing, here


def test_a_forked_child_gets_no_ticket() -> None:
    assert run(in_a_child) == (True, True)


# --- a rank -------------------------------------------------------------------------------------------------


def joining() -> None:
    """Wait for those that join in the background."""
    for thread in threads("mmlane-joining"):
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank(Scheduler("dp0", 0))
    yield rank
    joining()
    if rank._reader is not None:
        rank._reader.close()


def test_invitations_lead_a_rank_into_every_lane(rank: Rank) -> None:
    """Of several tokenizer workers, each has one."""
    one, other = Opening(), Opening()
    try:
        for opening in (one, other, one):
            rank.notice(opening.begin() if opening.producer.lane is None else opening.lane.invitation)
        for opening in (one, other):
            assert opening.lane.wait_open(DEADLINE)
            ticket = opening.send()
            assert torch.equal(rank.take(ticket), torch.ones(9))
            assert opening.lane.stats().joined == {"dp0": [0]}
    finally:
        one.close()
        other.close()


class Clock:
    """Stands in for `time` at both ends."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_lane_that_is_gone_is_tried_again_later(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, times, join = Clock(), 0, Reader.join

    def counted(self: Reader, *arguments: Any) -> None:
        nonlocal times
        times += 1
        join(self, *arguments)

    monkeypatch.setattr("mmlane.transport.rank.time", clock)
    monkeypatch.setattr(Reader, "join", counted)
    for _ in range(3):  # while it tries, and when it has
        rank.notice(NOWHERE)
        joining()
    (line,) = warnings(caplog)
    assert (
        "join failed: JoinRefused: " in line
        and "this reader (0 of dp0)" in line
        and NOWHERE.name in line
        and "tries again" in line
    )
    clock.now += RETRY_S - 0.1
    rank.notice(NOWHERE)
    joining()
    assert [times, len(warnings(caplog))] == [1, 1]
    clock.now += 0.2
    rank.notice(NOWHERE)
    joining()
    assert [times, len(warnings(caplog))] == [2, 1]  # the same again, which need not be said again


def test_a_rank_joins_at_a_later_try(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("mmlane.transport.rank.time", clock)
    invitation = opening.begin()
    rank = Rank(Scheduler("dp1", 0))  # which this lane does not expect
    rank.notice(invitation)
    joining()
    assert rank._reader is not None
    rank._reader.group = "dp0"
    clock.now += RETRY_S
    rank.notice(invitation)
    joining()
    assert opening.lane.wait_open(DEADLINE)
    rank._reader.close()


def test_a_rank_whose_connection_was_lost_before_the_lane_opened_joins_again(rank: Rank) -> None:
    opening = Opening(readers=2)
    try:
        rank.notice(opening.begin())
        joining()
        assert rank._reader is not None and rank._reader.lanes() == (opening.lane.name,)
        eventually(lambda: opening.lane.stats().joined == {"dp0": [0]}, "the producer hears of it")
        rank.notice(opening.lane.invitation)
        assert threads("mmlane-joining") == []  # it is there
        rank._reader._listener.links[opening.lane.name].connection.shutdown(socket.SHUT_RDWR)
        eventually(lambda: opening.lane.stats().joined == {"dp0": []}, "the producer hears of the loss")
        eventually(lambda: rank._reader is None or rank._reader.lanes() == (), "the rank hears of the loss")
        rank.notice(opening.lane.invitation)
        joining()
        opening.readers.append(Reader("dp0", 1))
        opening.readers[0].join(opening.lane.invitation, DEADLINE)
        assert opening.lane.wait_open(DEADLINE)
        ticket = opening.send()
        for take in (rank.take, opening.readers[0].take):
            assert torch.equal(take(ticket), torch.ones(9))
        eventually(lambda: opening.lane.stats().tickets == 0, "both release it")
    finally:
        opening.close()


def test_a_rank_without_room_for_a_thread_goes_on(
    rank: Rank, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invitation is heard while a message is unpickled, where an error would part this rank from its peers."""
    invitation = opening.begin()
    clock = Clock()
    monkeypatch.setattr("mmlane.transport.rank.time", clock)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", start)
        rank.notice(invitation)
    clock.now += RETRY_S
    rank.notice(invitation)
    assert opening.lane.wait_open(DEADLINE)


def test_a_producer_without_room_for_a_thread_goes_on(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def not_ours(self: threading.Thread) -> None:
        if self.name == "mmlane-lane":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", not_ours)
    opening.begin()
    opening.join()
    ticket = opening.send()
    opening.readers[0].discard(ticket)


def test_releasing_an_invalid_ticket_does_nothing(rank: Rank, opening: Opening) -> None:
    rank.release(b"before it has joined any")
    rank.notice(opening.begin())
    assert opening.lane.wait_open(DEADLINE)
    ticket = opening.send()
    for twice in (ticket, ticket, b"garbage"):
        rank.release(twice)
    eventually(lambda: opening.lane.stats().tickets == 0, "the release")
    other = opening.send()
    assert torch.equal(rank.take(other), torch.ones(9))  # whose release comes after those
    eventually(lambda: opening.lane.stats().tickets == 0, "the other release")
    assert opening.lane.stats().malformed_messages == 0


def test_a_producer_that_is_collected_while_its_lane_is_busy_closes_it_afterwards() -> None:
    """The garbage collector runs anywhere, also where the lane's lock is held: it must not wait for that."""
    producer = Producer(Tokenizer({"dp0": 1}, 8 * MIB))
    producer.put(torch.ones(9))
    lane = producer.lane
    assert lane is not None
    with lane.guard.lock:
        del producer
        gc.collect()  # does not wait for the lane's end, which waits for the lock
        assert lane._committer.memory is not None
    eventually(lambda: lane._committer.memory is None, "the lane's end")
    assert lane.is_closed
