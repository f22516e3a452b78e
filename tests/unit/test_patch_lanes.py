"""Who takes part in the lanes, and what a producer and a rank say and do when one cannot be had."""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.lane import Invitation, Lane, LaneUnavailable, Reader, cuda, memory, status  # noqa: E402
from mmlane_patches import arena, guard, lanes  # noqa: E402
from tests.lane.harness.child import run  # noqa: E402
from tests.lane.harness.confinement import limit_address_space  # noqa: E402
from tests.lane.harness.fake_cuda import FakeGpu  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402

MIB = 1 << 20
NOWHERE = Invitation.make("mmlane-1-00000000")
WHOLE = {
    "device": "cpu",
    "dp_size": 1,
    "tp_size": 1,
    "nnodes": 1,
    "enable_dp_attention": False,
    "elastic_ep_backend": None,
    "skip_tokenizer_init": False,
    "tokenizer_worker_num": 1,
    "enable_metrics": False,
}


def launched(**options: Any) -> Any:
    """The engine's arguments, as far as anybody here asks for them."""
    return SimpleNamespace(**{**WHOLE, **options})


class Manager:
    """A tokenizer manager."""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "rank", None)
    monkeypatch.setattr(guard, "_said", set())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mmlane" and r.levelno == logging.WARNING]


# --- who takes part -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"dp0": 1}),
        ({"tp_size": 4}, {"dp0": 4}),
        ({"tp_size": 2, "dp_size": 2}, {"dp0": 2, "dp1": 2}),
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, {"dp0": 2, "dp1": 2}),
        (
            {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True},
            dict.fromkeys(("dp0", "dp1", "dp2", "dp3"), 1),
        ),
        ({"tp_size": 4, "dp_size": 1, "enable_dp_attention": True}, {"dp0": 4}),
        ({"tp_size": 2, "pp_size": 2}, {"dp0": 2}),  # the second stage is sent nothing by the tokenizer
    ],
)
def test_which_readers_are_expected(options: dict[str, Any], wanted: dict[str, int]) -> None:
    server_args = launched(**options)
    assert lanes.readers_of(server_args) == wanted
    assert {lanes.group_of(server_args, rank) for rank in range(server_args.dp_size)} == wanted.keys()


@pytest.mark.parametrize(
    ("dp_size", "dp_rank", "group"),
    [(1, None, "dp0"), (1, 3, "dp0"), (2, None, "dp0"), (2, 0, "dp0"), (2, 1, "dp1")],
)
def test_which_group_a_rank_is_of(dp_size: int, dp_rank: int | None, group: str) -> None:
    """Behind a router every engine is of size 1, and has a number all the same."""
    lanes.become_rank(launched(dp_size=dp_size), dp_rank, 0, 0)
    assert lanes.rank is not None and lanes.rank.group == group


RUNTIME = "sglang.srt.runtime_context"
WRAPPING = "sglang.srt.managers.mm_utils"
PARALLEL = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "num_dp_ranks": 2, "attn_dp_size": 2}


@pytest.mark.parametrize("names", [["derive_attention_widths"], ["num_dp_ranks_of"]], ids=["0.5.19", "0.5.22"])
def test_the_engines_own_decision_counts_where_it_tells_it(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ModuleType(RUNTIME)
    vars(context).update(dict.fromkeys(names), get_parallel=lambda: SimpleNamespace(**PARALLEL))
    monkeypatch.setitem(sys.modules, RUNTIME, context)
    typed = launched(tp_size=4)  # and the rest was decided since
    assert lanes.readers_of(typed) == {"dp0": 2, "dp1": 2}
    assert lanes.group_of(typed, 1) == "dp1"


def test_before_that_the_arguments_are_what_the_engine_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ModuleType(RUNTIME)
    vars(context)["get_parallel"] = lambda: SimpleNamespace(**PARALLEL)
    monkeypatch.setitem(sys.modules, RUNTIME, context)
    assert lanes.readers_of(launched(tp_size=4)) == {"dp0": 4}


RanksPlace = tuple[str, int | None]  # group and number


def place(server_args: Any, dp_rank: int | None, pp_rank: int, tp_rank: int) -> RanksPlace:
    """What a scheduler with these ranks becomes."""
    lanes.become_rank(server_args, dp_rank, pp_rank, tp_rank)
    assert lanes.rank is not None
    return lanes.rank.group, lanes.rank.number


DP_ATTENTION = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}


@pytest.mark.parametrize(
    ("options", "ranks", "wanted"),
    [
        ({}, (None, 0, 0), ("dp0", 0)),
        ({"tp_size": 4}, (None, 0, 3), ("dp0", 3)),
        ({"tp_size": 2, "dp_size": 2}, (1, 0, 0), ("dp1", 0)),
        ({"tp_size": 2, "dp_size": 2}, (1, 0, 1), ("dp1", 1)),
        (DP_ATTENTION, (0, 0, 1), ("dp0", 1)),
        (DP_ATTENTION, (1, 0, 2), ("dp1", 0)),
        (DP_ATTENTION, (1, 0, 3), ("dp1", 1)),
        ({**DP_ATTENTION, "dp_size": 4}, (3, 0, 3), ("dp3", 0)),
        ({"tp_size": 2, "pp_size": 2}, (None, 1, 1), ("dp0", None)),
        ({"tp_size": 2, "pp_size": 2, "dp_size": 2}, (1, 1, 0), ("dp1", None)),
    ],
)
def test_which_number_a_rank_has(
    options: dict[str, Any], ranks: tuple[int | None, int, int], wanted: RanksPlace
) -> None:
    assert place(launched(**options), *ranks) == wanted


# What each release calls the facts that it has made of the arguments; 0.5.18 and older changed the arguments.
TOLD_BY: dict[str, tuple[str, ...]] = {
    "0.5.18": (),
    "0.5.19": ("derive_attention_widths",),
    "0.5.22": ("derive_attention_widths", "num_dp_ranks_of"),
}


@pytest.mark.parametrize("release", TOLD_BY)
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("tp", "dp", "pp"), [(1, 1, 1), (4, 1, 1), (4, 2, 1), (2, 1, 3), (4, 4, 1), (4, 2, 2)])
def test_every_expected_reader_is_one_rank(
    release: str, attention: bool, tp: int, dp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a lane would never open, or two ranks would dispute a number."""
    facts = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": attention, "pp_size": pp}
    if names := TOLD_BY[release]:
        context = ModuleType(RUNTIME)
        parallel = SimpleNamespace(**facts, num_dp_ranks=dp, attn_dp_size=dp if attention else 1)
        vars(context).update(dict.fromkeys(names), get_parallel=lambda: parallel)
        monkeypatch.setitem(sys.modules, RUNTIME, context)
    server_args = launched() if names else launched(**facts)
    if attention:  # one world of `tp` ranks, of which neighbours make an attention group
        ranks = [(tp_rank // (tp // dp), tp_rank) for tp_rank in range(tp)]
    else:
        ranks = [(dp_rank, tp_rank) for dp_rank in range(dp) for tp_rank in range(tp)]
    places = [place(server_args, dp_rank, stage, tp_rank) for stage in range(pp) for dp_rank, tp_rank in ranks]
    assert [number for _, number in places[len(ranks) :]] == [None] * (pp - 1) * len(ranks)
    expected = lanes.readers_of(server_args).items()
    assert sorted(places[: len(ranks)]) == [(group, n) for group, count in expected for n in range(count)]


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
    init: Any = arena._reading(SchedulerOf0520.__init__)
    before = SchedulerOf0520.__new__(SchedulerOf0520)
    if by_name:
        ranks = {"tp_rank": tp_rank, "pp_rank": pp_rank, "dp_rank": dp_rank}
        init(before, server_args, None, gpu_id=7, moe_ep_rank=7, attn_cp_rank=7, moe_dp_rank=7, **ranks)
    else:
        init(before, server_args, None, 7, tp_rank, 7, pp_rank, 7, 7, dp_rank)
    assert lanes.rank is not None and (lanes.rank.group, lanes.rank.number) == wanted
    monkeypatch.setattr(lanes, "rank", None)
    context = ModuleType(RUNTIME)
    parallel = SimpleNamespace(dp_rank=dp_rank, pp_rank=pp_rank, tp_rank=tp_rank)
    vars(context)["get_parallel"] = lambda: parallel
    monkeypatch.setitem(sys.modules, RUNTIME, context)
    init = arena._reading(SchedulerOf0521.__init__)
    init(SchedulerOf0521.__new__(SchedulerOf0521), server_args, None)
    rank = lanes.rank
    assert rank is not None and (rank.group, rank.number) == wanted


def test_a_later_pipeline_stage_never_joins(opening: Opening) -> None:
    """It hears of the lane when the first stage passes a message on; joining would cost the lane a member."""
    lanes.become_rank(launched(pp_size=2), None, 1, 0)
    later = lanes.rank
    assert later is not None
    later.notice(opening.begin())
    assert threads("mmlane-joining") == [] and later._reader is None
    later.discard(b"what it cannot have")
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
    lanes.become_rank(launched(dp_size=2), *ranks)
    assert len(warnings(caplog)) == said


OBSTACLES = [
    ({"nnodes": 2}, "2 nodes"),
    ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend"),
    ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
]


@pytest.mark.parametrize(("options", "named"), OBSTACLES)
def test_what_is_in_the_way(options: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture) -> None:
    assert named in lanes.obstacle(launched(**options))
    manager = Manager()
    lanes.become_producer(manager, launched(**options), multimodal=False, capacity=None)
    assert manager not in lanes.producers and warnings(caplog) == []  # who sends no images need not know
    lanes.become_producer(manager, launched(**options), multimodal=True, capacity=None)
    assert manager not in lanes.producers
    (line,) = warnings(caplog)
    assert named in line and "MMLANE=backport silences this" in line


def test_nothing_is_in_the_way() -> None:
    assert lanes.obstacle(launched()) == ""
    older = launched()
    del older.elastic_ep_backend  # which releases below 0.5.10 do not have
    assert lanes.obstacle(older) == ""


@pytest.mark.parametrize(("inside", "named"), [(True, "--dist-init-addr"), (False, "")])
def test_the_engine_is_asked_whether_features_travel_at_all(
    inside: bool, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapping = ModuleType(WRAPPING)
    vars(wrapping)["_get_is_default_transport"] = lambda: inside
    monkeypatch.setitem(sys.modules, WRAPPING, wrapping)
    assert lanes.obstacle(launched()).partition(",")[0] == named


@pytest.mark.parametrize(("workers", "share"), [(0, 1), (1, 1), (4, 4)])
def test_tokenizer_workers_share_the_capacity(workers: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "default_capacity", lambda: 400 * MIB)
    server_args = launched(tp_size=2, tokenizer_worker_num=workers)
    manager, with_a_wish = Manager(), Manager()
    lanes.become_producer(manager, server_args, multimodal=True, capacity=None)
    lanes.become_producer(with_a_wish, server_args, multimodal=True, capacity=8 * MIB)
    for owner, capacity in ((manager, 400 * MIB // share), (with_a_wish, 8 * MIB)):  # a wish is for each
        producer = lanes.producers[owner]
        ticket, invitation = producer.put(torch.ones(9))
        lane = producer.lane
        assert ticket is None and lane is not None and lane.invitation == invitation
        assert lane.stats().capacity_bytes == capacity and lane.expected == {"dp0": 2}
        lane.close()


CONTEXT = {"get_device": lambda: SimpleNamespace(device="cuda"), "get_parallel": lambda: None}


@pytest.mark.parametrize(
    ("device", "known", "on_cuda"),
    [("cuda", {}, True), ("cuda:0", {}, True), ("cpu", {}, False), (None, CONTEXT, True), ("cpu", CONTEXT, False)],
    ids=["cuda", "one cuda", "cpu", "0.5.19, not said", "0.5.19, said"],
)
def test_whether_the_engine_is_on_cuda(
    device: str | None, known: dict[str, Any], on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ModuleType(RUNTIME)
    vars(context).update(known)
    monkeypatch.setitem(sys.modules, RUNTIME, context)
    assert lanes.on_cuda(launched(device=device)) is on_cuda


@pytest.mark.parametrize(
    ("device", "workers", "wish", "pinned"),
    [("cuda", 1, None, 1024), ("cuda", 4, None, 256), ("cuda", 4, 64, 64), ("cuda", 1, 0, 0), ("cpu", 1, None, 0)],
)
def test_what_a_lane_keeps_for_gpus(
    device: str, workers: int, wish: int | None, pinned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, Any] = {}

    def refuse(readers: dict[str, int], **options: Any) -> None:
        opened.update(options)
        raise LaneUnavailable("only asked")

    monkeypatch.setattr(lanes, "Lane", refuse)
    manager = Manager()
    lanes.become_producer(
        manager,
        launched(device=device, tokenizer_worker_num=workers),
        multimodal=True,
        capacity=None,
        pinned=None if wish is None else wish * MIB,
    )
    lanes.producers[manager].put(torch.ones(9))
    assert opened["pinned"] == pinned * MIB


@pytest.mark.parametrize(("pinned", "writable"), [(None, False), (64 * MIB, False), (0, True)])
def test_a_rank_on_cuda(pinned: int | None, writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes views, on the device that its scheduler has set; without pinned memory, what can be written to."""
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "Cuda", gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    lanes.become_rank(launched(device="cuda"), None, 0, 0, pinned=pinned)
    rank = lanes.rank
    assert rank is not None
    producer = lanes.Producer({"dp0": 1}, 8 * MIB, pinned=4 * MIB if pinned is None else pinned)
    _, invitation = producer.put(torch.ones(9))
    assert invitation is not None
    rank.notice(invitation)
    lane = producer.lane
    assert lane is not None and lane.wait_open(DEADLINE) and rank._reader is not None
    assert rank._reader.wait_pinned(lane.name, DEADLINE if pinned != 0 else 0) is (not writable)
    ticket, _ = producer.put(torch.ones(9))
    assert ticket is not None and gpu.index == 3
    taken = rank.take(ticket)
    assert torch.equal(taken, torch.ones(9))
    (start, nbytes), *_ = [*gpu.registered.items(), (0, 0)]
    assert (start <= taken.data_ptr() < start + nbytes) is not writable
    if writable:
        taken += 1
    rank._reader.close()
    lane.close()


def test_a_rank_on_a_cpu_has_no_device() -> None:
    lanes.become_rank(launched(), None, 0, 0)
    assert lanes.rank is not None and lanes.rank._device is None


def test_a_lane_ends_with_its_manager() -> None:
    one, other = Manager(), Manager()  # two engines in one process
    for manager in (one, other):
        lanes.become_producer(manager, launched(), multimodal=True, capacity=8 * MIB)
        lanes.producers[manager].put(torch.ones(9))
    first, second = (lanes.producers[manager].lane for manager in (one, other))
    assert first is not None and second is not None
    with Reader("dp0") as reader:
        reader.join(first.invitation, DEADLINE)
        reader.join(second.invitation, DEADLINE)
        announcing()  # until then its thread keeps it
        del one, manager
        gc.collect()
        eventually(lambda: first.is_closed, "the lane's end")  # a thread closes it
        assert not second.is_closed
        del other
        gc.collect()
        eventually(lambda: second.is_closed, "the other lane's end")


# --- a producer ---------------------------------------------------------------------------------------------


class Opening:
    """A producer and what it needs readers for."""

    def __init__(self, readers: int = 1, capacity: int = 8 * MIB) -> None:
        self.producer = lanes.Producer({"dp0": readers}, capacity)
        self.readers: list[Reader] = []

    @property
    def lane(self) -> Lane:
        assert self.producer.lane is not None
        return self.producer.lane

    def begin(self) -> Invitation:
        """What the first feature's readers get."""
        ticket, invitation = self.producer.put(torch.ones(9))
        assert ticket is None and invitation == self.lane.invitation
        return self.lane.invitation

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

    monkeypatch.setattr(Lane, "put", fails)
    before = guard.failures["put"]
    assert opening.producer.put(torch.ones(9)) == (None, None)
    assert guard.failures["put"] == before + 1
    monkeypatch.undo()
    assert isinstance(opening.producer.put(torch.ones(9))[0], bytes)
    monkeypatch.setattr(Reader, "join", fails)
    lanes.become_rank(launched(), None, 0, 0)
    assert lanes.rank is not None
    lanes.rank.notice(opening.lane.invitation)
    eventually(lambda: any("join failed: ZeroDivisionError" in line for line in warnings(caplog)), "a line")


# --- the samples of one request -----------------------------------------------------------------------------


def used(opening: Opening) -> int:
    return opening.lane.stats().used_bytes


def test_samples_share_one_copy_that_outlives_the_first_answer(opening: Opening) -> None:
    opening.begin()
    opening.join()
    (reader,) = opening.readers
    tensor = torch.arange(30_000)
    together = lanes.Samples(4)
    token = lanes.samples.set(together)
    try:
        for _ in range(4):
            ticket, _ = opening.producer.put(tensor)
            assert ticket is not None
            assert torch.equal(reader.take(ticket, "clone"), torch.arange(30_000))  # which releases it
        assert (opening.lane.stats().copied_bytes, opening.lane.stats().shared) == (tensor.nbytes, 3)
        assert used(opening) == 0  # also while the request goes on
        ticket, _ = opening.producer.put(tensor)  # the same tensor for another prompt of the request
        tensor.numpy().fill(7)
        other, _ = opening.producer.put(torch.zeros(30_000))
        assert ticket is not None and other is not None
        for each in (ticket, other):
            reader.discard(each)
        eventually(lambda: opening.lane.stats().tickets == 0, "the release of both")
        assert used(opening) > 0
    finally:
        lanes.samples.reset(token)
    together.close()
    assert used(opening) == 0


def test_a_tensor_that_is_refilled_for_the_next_request_is_copied_again(opening: Opening) -> None:
    opening.begin()
    opening.join()
    (reader,) = opening.readers
    tensor = torch.zeros(30_000)
    for number in range(3):
        tensor.numpy().fill(number)
        ticket, _ = opening.producer.put(tensor)
        assert ticket is not None
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
    assert opening.producer.put(torch.ones(9)) == (None, opening.lane.invitation)  # still
    opening.join()
    announcing()
    (line,) = [r.getMessage() for r in caplog.records if "the lane is open" in r.getMessage()]
    assert line.startswith("mmlane: the lane is open: 1 ranks, 0.0 GiB of room, ")
    assert warnings(caplog) == []
    ticket, invitation = opening.producer.put(torch.ones(9))
    assert ticket is not None and invitation is None
    assert torch.equal(opening.readers[0].take(ticket), torch.ones(9))


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
    lanes.logger.addHandler(said)
    monkeypatch.setattr(lanes, "OPENING_S", 0.0)
    yield said
    lanes.logger.removeHandler(said)


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
    assert "not all of its 1 ranks" in late and "`mmlane status`" in late and "the lane is open" in opened


def test_nobody_waits_for_a_lane_that_is_closed(opening: Opening, unopened: Said) -> None:
    opening.begin()
    assert unopened.event.wait(DEADLINE)
    opening.lane.close()
    announcing()
    assert opening.producer.put(torch.ones(9)) == (None, None)


@pytest.mark.parametrize(
    ("cause", "too_large"), [("oversize", 9 * MIB), ("full", 5 * MIB)], ids=["oversize", "full"]
)
def test_a_tensor_that_has_no_place(
    opening: Opening, cause: str, too_large: int, caplog: pytest.LogCaptureFixture
) -> None:
    opening.begin()
    opening.join()
    kept = torch.ones(5 * MIB, dtype=torch.uint8)
    held, _ = opening.producer.put(kept)
    assert held is not None
    for _ in range(2):
        assert opening.producer.put(torch.zeros(too_large, dtype=torch.uint8)) == (None, None)
    (line,) = warnings(caplog)
    assert f"the lane has no place for a feature ({cause})" in line and "shared-memory segment" in line
    assert opening.lane.stats().fallbacks[cause] == 2  # type: ignore[index]
    small, _ = opening.producer.put(torch.ones(9))
    assert small is not None
    for ticket in (held, small):
        opening.readers[0].discard(ticket)


def test_one_line_for_each_cause(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    opening.begin()
    opening.join()
    opening.producer.put(torch.zeros(9 * MIB, dtype=torch.uint8))
    opening.producer.put(torch.eye(3).to_sparse())
    opening.lane.close()
    for _ in range(2):
        assert opening.producer.put(torch.ones(9)) == (None, None)
    assert [line.partition("(")[2].partition(")")[0] for line in warnings(caplog)] == [
        "oversize",
        "unsupported",
        "closed",
    ]


def state(opening: Opening) -> str:
    return opening.producer.state


def test_a_lane_that_is_switched_off_and_on_again(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    """Meanwhile features go another way, to ranks that stay members; what was out before can be taken."""
    opening.begin()
    opening.join()
    before, _ = opening.producer.put(torch.ones(9))
    assert before is not None
    status.switch(opening.lane.name, off=True)
    for _ in range(2):
        assert opening.producer.put(torch.ones(9)) == (None, None)
    assert state(opening) == "off" and opening.lane.stats().fallbacks["off"] == 2
    (line,) = warnings(caplog)
    assert "(off)" in line and "`mmlane on`" in line and "shared-memory segment" in line
    assert torch.equal(opening.readers[0].take(before), torch.ones(9))
    status.switch(opening.lane.name, off=False)
    ticket, _ = opening.producer.put(torch.ones(9))
    assert ticket is not None and state(opening) == "open"
    assert torch.equal(opening.readers[0].take(ticket), torch.ones(9))
    status.switch(opening.lane.name, off=True)
    assert opening.producer.put(torch.ones(9)) == (None, None)
    assert len(warnings(caplog)) == 1


def test_a_lane_that_is_switched_off_before_it_opens_invites_nobody_until_it_is_on(opening: Opening) -> None:
    opening.begin()
    status.switch(opening.lane.name, off=True)
    assert opening.producer.put(torch.ones(9)) == (None, None) and state(opening) == "off"
    status.switch(opening.lane.name, off=False)
    assert opening.producer.put(torch.ones(9)) == (None, opening.lane.invitation)
    assert state(opening) == "opening"


def test_a_ticket_that_was_not_sent_is_void(opening: Opening) -> None:
    opening.begin()
    opening.join()
    ticket, _ = opening.producer.put(torch.ones(9))
    assert ticket is not None and opening.lane.stats().tickets == 1
    opening.producer.withdraw(ticket)
    assert opening.lane.stats().tickets == 0


@pytest.mark.parametrize("capacity", [99_999_999_999 * MIB, 1 << 63, 1 << 64, 10**40])
def test_a_lane_that_cannot_be_had_is_said_at_start_and_only_then(
    capacity: int, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager()
    lanes.become_producer(manager, launched(), multimodal=True, capacity=capacity)
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: no lane here: ") and "shared-memory segments instead" in line
    assert f"MMLANE_CAPACITY_MB (here {capacity // MIB})" in line
    producer = lanes.producers[manager]
    assert producer.state == "failed"
    assert producer.put(torch.ones(9)) == (None, None)
    assert len(warnings(caplog)) == 1


def test_a_lane_that_was_not_made_for_any_other_reason_has_failed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def lane(*arguments: Any, **options: Any) -> Lane:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(lanes, "Lane", lane)
    producer = lanes.Producer({"dp0": 1}, capacity=8 * MIB)
    with suppress(RuntimeError):
        producer.put(torch.ones(9))
    assert producer.state == "failed"


def test_a_text_only_model_has_no_lane_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager()
    lanes.become_producer(manager, launched(), multimodal=False, capacity=1 << 62)
    assert warnings(caplog) == [] and lanes.producers[manager].state == "unused"


def test_trying_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def held() -> set[str]:
        """Inodes of what is mapped or open; those of lanes that other tests had may still go."""
        mapped = re.findall(r"(\d+) +/memfd:mmlane", Path("/proc/self/maps").read_text())
        opened = [file for file in [*Path("/proc/self/fd").iterdir()] if file.exists()]  # not the listing's own
        return {*mapped, *(str(file.stat().st_ino) for file in opened if "memfd:mmlane" in str(file.readlink()))}

    with Lane({"dp0": 1}, capacity=8 * MIB):
        assert held()  # it is seen
    before = held()
    manager = Manager()
    lanes.become_producer(manager, launched(), multimodal=True, capacity=8 * MIB)
    assert warnings(caplog) == [] and lanes.producers[manager].state == "unused"
    assert held() <= before


@pytest.mark.parametrize(("options", "state"), [({}, "unused"), ({"nnodes": 2}, "off")])
def test_metrics_begin_at_start(options: dict[str, Any], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlane_patches import metrics

    found: list[str] = []
    monkeypatch.setattr(metrics, "begin", lambda owner, state: found.append(state()))
    lanes.become_producer(Manager(), launched(**options), multimodal=True, capacity=8 * MIB)
    assert found == []
    lanes.become_producer(Manager(), launched(enable_metrics=True, **options), multimodal=True, capacity=8 * MIB)
    assert found == [state]


def test_metrics_that_cannot_begin_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mmlane_patches import metrics

    def begin(*arguments: Any) -> None:
        raise ValueError("Duplicated timeseries")

    monkeypatch.setattr(metrics, "begin", begin)
    manager = Manager()
    lanes.become_producer(manager, launched(enable_metrics=True), multimodal=True, capacity=8 * MIB)
    assert manager in lanes.producers
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: metrics failed: ValueError: Dup") and "not in /metrics" in line


def test_a_lane_that_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    producer = lanes.Producer({"dp0": 1}, capacity=1 << 62)
    for _ in range(2):
        assert producer.put(torch.ones(9)) == (None, None)
    producer.withdraw(b"no ticket of anybody")
    assert producer.lane is None
    (line,) = warnings(caplog)
    assert line.startswith("mmlane: no lane here: ") and "shared-memory segments instead" in line


def confined() -> tuple[list[tuple[bytes | None, Invitation | None]], list[str]]:
    """In a process that may have no more address room."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    lanes.logger.addHandler(handler)
    limit_address_space(256 * MIB)
    producer = lanes.Producer({"dp0": 1}, capacity=1 << 30)
    return [producer.put(torch.ones(9)) for _ in range(2)], lines


def test_a_process_without_address_room_goes_on() -> None:
    found, lines = run(confined)
    assert found == [(None, None)] * 2
    (line,) = lines
    assert "no lane here" in line and "ulimit -v" in line


def in_a_child() -> tuple[bool, bool]:
    """Whether a forked child gets nothing, and its parent goes on; called in a process of its own."""
    opening = Opening()
    opening.begin()
    opening.join()
    ticket, _ = opening.producer.put(torch.ones(9))
    assert ticket is not None
    pid = os.fork()
    if pid == 0:
        there = opening.producer
        there.withdraw(ticket)  # is its parent's
        os._exit(0 if there.put(torch.ones(9)) == (None, None) and there.lane is None else 1)
    nothing = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    here = torch.equal(opening.readers[0].take(ticket), torch.ones(9))
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
def rank() -> Iterator[lanes.Rank]:
    rank = lanes.Rank("dp0", 0)
    yield rank
    joining()
    if rank._reader is not None:
        rank._reader.close()


def test_invitations_lead_a_rank_into_every_lane(rank: lanes.Rank) -> None:
    """Of several tokenizer workers, each has one."""
    one, other = Opening(), Opening()
    try:
        for opening in (one, other, one):
            rank.notice(opening.begin() if opening.producer.lane is None else opening.lane.invitation)
        for opening in (one, other):
            assert opening.lane.wait_open(DEADLINE)
            ticket, _ = opening.producer.put(torch.ones(9))
            assert ticket is not None
            assert torch.equal(rank.take(ticket), torch.ones(9))
            assert opening.lane.stats().joined == {"dp0": [0]}
    finally:
        one.close()
        other.close()


class Clock:
    """Stands in for `time` in `lanes`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_lane_that_is_gone_is_tried_again_later(
    rank: lanes.Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, times, join = Clock(), 0, Reader.join

    def counted(self: Reader, *arguments: Any) -> None:
        nonlocal times
        times += 1
        join(self, *arguments)

    monkeypatch.setattr(lanes, "time", clock)
    monkeypatch.setattr(Reader, "join", counted)
    for _ in range(3):  # while it tries, and when it has
        rank.notice(NOWHERE)
        joining()
    (line,) = warnings(caplog)
    assert (
        "join failed: JoinRefused: " in line
        and "this rank (0 of dp0)" in line
        and NOWHERE.name in line
        and "tries again" in line
    )
    clock.now += lanes.RETRY_S - 0.1
    rank.notice(NOWHERE)
    joining()
    assert [times, len(warnings(caplog))] == [1, 1]
    clock.now += 0.2
    rank.notice(NOWHERE)
    joining()
    assert [times, len(warnings(caplog))] == [2, 1]  # the same again, which need not be said again


def test_a_rank_joins_at_a_later_try(rank: lanes.Rank, opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(lanes, "time", clock)
    invitation = opening.begin()
    rank.group = "dp1"  # which this lane does not expect
    rank.notice(invitation)
    joining()
    assert rank._reader is not None
    rank._reader.group = "dp0"
    clock.now += lanes.RETRY_S
    rank.notice(invitation)
    joining()
    assert opening.lane.wait_open(DEADLINE)


def test_a_rank_whose_connection_was_lost_before_the_lane_opened_joins_again(rank: lanes.Rank) -> None:
    opening = Opening(readers=2)
    try:
        rank.notice(opening.begin())
        joining()
        assert rank._reader is not None and rank._reader.lanes() == (opening.lane.name,)
        eventually(lambda: opening.lane.stats().joined == {"dp0": [0]}, "the producer hears of it")
        rank.notice(opening.lane.invitation)
        assert threads("mmlane-joining") == []  # it is there
        rank._reader._links[opening.lane.name].connection.shutdown(socket.SHUT_RDWR)
        eventually(lambda: opening.lane.stats().joined == {"dp0": []}, "the producer hears of the loss")
        eventually(lambda: rank._reader is None or rank._reader.lanes() == (), "the rank hears of the loss")
        rank.notice(opening.lane.invitation)
        joining()
        opening.readers.append(Reader("dp0", 1))
        opening.readers[0].join(opening.lane.invitation, DEADLINE)
        assert opening.lane.wait_open(DEADLINE)
        ticket, _ = opening.producer.put(torch.ones(9))
        assert ticket is not None
        for take in (rank.take, opening.readers[0].take):
            assert torch.equal(take(ticket), torch.ones(9))
        eventually(lambda: opening.lane.stats().tickets == 0, "both release it")
    finally:
        opening.close()


def test_a_rank_without_room_for_a_thread_goes_on(
    rank: lanes.Rank, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invitation is heard while a message is unpickled, where an error would part this rank from its peers."""
    invitation = opening.begin()
    clock = Clock()
    monkeypatch.setattr(lanes, "time", clock)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", start)
        rank.notice(invitation)
    clock.now += lanes.RETRY_S
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
    ticket, _ = opening.producer.put(torch.ones(9))
    assert ticket is not None
    opening.readers[0].discard(ticket)


def test_releasing_what_cannot_be_is_nothing(rank: lanes.Rank, opening: Opening) -> None:
    rank.discard(b"before it has joined any")
    rank.notice(opening.begin())
    assert opening.lane.wait_open(DEADLINE)
    ticket, _ = opening.producer.put(torch.ones(9))
    assert ticket is not None
    for twice in (ticket, ticket, b"garbage"):
        rank.discard(twice)
    eventually(lambda: opening.lane.stats().tickets == 0, "the release")
    other, _ = opening.producer.put(torch.ones(9))
    assert other is not None
    assert torch.equal(rank.take(other), torch.ones(9))  # whose release comes after those
    eventually(lambda: opening.lane.stats().tickets == 0, "the other release")
    assert opening.lane.stats().malformed_messages == 0


def test_reading_who_takes_part_needs_no_engine() -> None:
    assert "sglang" not in sys.modules


def test_a_producer_that_is_collected_while_its_lane_is_busy_closes_it_afterwards() -> None:
    """The garbage collector runs anywhere, also where the lane's lock is held: it must not wait for that."""
    producer = lanes.Producer({"dp0": 1}, 8 * MIB)
    producer.put(torch.ones(9))
    lane = producer.lane
    assert lane is not None
    with lane.lock:
        del producer
        gc.collect()  # does not wait for the lane's end, which waits for the lock
        assert lane._mapping is not None
    eventually(lambda: lane._mapping is None, "the lane's end")
    assert lane.is_closed
