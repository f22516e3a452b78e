"""The numbers of /metrics: those of the lanes, added up, and what tokenizers have a lane; whatever fails there."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from mmlane import __version__, log  # noqa: E402
from mmlane.lane import JoinRefused, Lane, LaneStats, Reader, Refused, status  # noqa: E402
from mmlane.lane.status import FORMER  # noqa: E402
from mmlane.transport import metrics  # noqa: E402
from mmlane.transport.base import Declined, Tokenizer  # noqa: E402
from mmlane.transport.lane import STATES, Producer  # noqa: E402
from mmlane.transport.metrics import Meter  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402

MIB = 1 << 20


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"mmlane_{name}", labels) or 0.0


def numbers() -> dict[str, float]:
    return {
        "capacity": value("capacity_bytes"),
        "expected": value("expected_readers"),
        "joined": value("joined_readers"),
        "not_open": value("fallbacks_total", cause="not_open"),
        "puts": value("puts_total"),
    }


def states() -> dict[str, float]:
    """The states that tokenizers are in, and how many in each."""
    return {state: count for state in STATES if (count := value("lanes", state=state))}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer of another test is still there."""
    monkeypatch.setattr(metrics, "_meters", set())


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written between a test's own writes."""
    monkeypatch.setattr(metrics, "_keep_writing", lambda: None)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numbers are written all the time; the thread that does it ends with the test."""
    monkeypatch.setattr(metrics, "PERIOD_S", 0.01)
    yield
    eventually(lambda: not writing(), "the thread's end")


def writing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mmlane-metrics"]


class Owner:
    """A tokenizer manager."""


def producing(capacity: int = 8 * MIB) -> Producer:
    return Producer(Tokenizer({"dp0": 1}, capacity))


def test_lanes_are_added_up(by_hand: None) -> None:
    before = numbers()
    owners = [Owner(), Owner()]  # each with a lane
    with Lane({"dp0": 2}, capacity=8 << 20) as one, Lane({"dp0": 1, "dp1": 1}, capacity=4 << 20) as other:
        for owner, lane in zip(owners, (one, other), strict=True):
            assert isinstance(lane.put(torch.ones(9)), Refused)
            Meter(owner).watch(lane)
        for _ in range(2):  # nothing is counted twice
            metrics.write()
            assert numbers() == {
                "capacity": 12 << 20,
                "expected": 4,
                "joined": 0,
                "not_open": before["not_open"] + 2,
                "puts": before["puts"],
            }
        other.close()
        metrics.write()  # the last of the one that is closed
        metrics.write()
        assert numbers()["capacity"] == 8 << 20
        assert numbers()["not_open"] == before["not_open"] + 2
    metrics.write()
    metrics.write()
    assert numbers()["capacity"] == 0


def test_who_runs_and_how_the_lane_is_can_be_seen_from_the_start_on(by_hand: None) -> None:
    owner, producer = Owner(), producing()
    meter = Meter(owner)
    meter.begin(lambda: producer.state, "lane")
    assert value("info", version=__version__, mode="lane") == 1
    assert states() == {"unused": 1}
    answer = producer.put(torch.ones(9))
    assert isinstance(answer, Declined) and answer.cause == "not_open"
    metrics.write()
    assert states() == {"opening": 1}
    reader = Reader("dp0", 0)
    assert producer.lane is not None
    reader.join(producer.lane.invitation)
    assert producer.lane.wait_open(DEADLINE)
    meter.watch(producer.lane)
    assert states() == {"open": 1} and numbers()["joined"] == 1
    before = value("fallbacks_total", cause="off")
    status.switch(producer.lane.name, off=True)
    assert producer.put(torch.ones(9)) == Declined("off")
    metrics.write()
    assert states() == {"off": 1} and numbers()["joined"] == 1
    assert value("fallbacks_total", cause="off") == before + 1
    status.switch(producer.lane.name, off=False)
    metrics.write()
    assert states() == {"open": 1}
    producer.lane.close()
    reader.close()
    metrics.write()
    assert states() == {"failed": 1}
    del owner
    metrics.write()
    assert states() == {}


# --- names ---

DOCS = (Path(__file__).parents[2] / "docs/engine.md").read_text(encoding="utf-8")
NO_NUMBERS = {"name", "pid", "state", "degraded"}  # who it is, and what is said in words


def test_each_number_of_a_lane_has_a_metric_of_the_same_name() -> None:
    figures = {field.name for field in fields(LaneStats)} - NO_NUMBERS
    assert {*metrics.GAUGES, *metrics.TOTALS, "fallbacks"} == figures
    made = {metric.name for metric in metrics.REGISTRY.collect()}
    assert {f"mmlane_{name}" for name in figures} < made
    former = {was.metric for was in FORMER.values() if was.metric}
    assert made == {f"mmlane_{name}" for name in figures} | former | {
        "mmlane_info",
        "mmlane_lanes",
        "mmlane_failures",
        "mmlane_node_bytes",
    }


def test_the_documentation_lists_all_metrics_and_what_they_were_called() -> None:
    section = DOCS.partition("\n## Watching it\n")[2].partition("\n## ")[0]
    for name in metrics.GAUGES:
        assert f"`mmlane_{name}`" in section
    for name in metrics.TOTALS:
        assert f"`mmlane_{name}_total`" in section
    assert "`mmlane_node_bytes_total{direction}`" in section
    rows = [line for line in section.splitlines() if line.startswith("|")]
    for name, was in FORMER.items():
        metric = f'`{was.metric}{{kind="{was.kind}"}}`' if was.kind else f"`{was.metric}`"
        (row,) = [line for line in rows if line.startswith(f"| `{name}` |")]
        assert row.split(" | ")[1] == (f"`{was.key}`" if was.key else "")
        assert row.split(" | ")[2] == (f"{metric} |" if was.metric else "|")


def test_a_number_is_there_by_its_former_name_as_well(by_hand: None) -> None:
    owner = Owner()
    with Lane({"dp0": 2, "dp1": 1}, capacity=8 * MIB) as lane, Reader("dp0", 1) as reader:
        reader.join(lane.invitation)
        eventually(lambda: lane.stats().joined_readers["dp0"] == [1], "the reader has joined")
        Meter(owner).watch(lane)
        assert (value("capacity_bytes"), value("expected_readers"), value("joined_readers")) == (8 * MIB, 3, 1)
        for name, (_, former, kind) in FORMER.items():
            if former:
                labels = {"kind": kind} if kind else {}
                assert metrics.REGISTRY.get_sample_value(former, labels) == value(name), name
    metrics.write()


def test_processes_that_were_rejected_are_counted(by_hand: None) -> None:
    before, owner = value("rejected_peers_total"), Owner()
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane:
        Meter(owner).watch(lane)
        with pytest.raises(JoinRefused), Reader("dp0", 1) as reader:  # a number that is not expected
            reader.join(lane.invitation)
        eventually(lambda: lane.stats().rejected_peers == 1, "its rejection is counted")
        metrics.write()
        assert value("rejected_peers_total") == before + 1
    metrics.write()


def test_lost_tickets_are_counted(by_hand: None) -> None:
    before, owner = value("lost_tickets_total"), Owner()
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane, Reader("dp0", 0) as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        Meter(owner).watch(lane)
        ticket = lane.put(torch.ones(9))
        assert isinstance(ticket, bytes)
        lane.recall(ticket)
        lane.housekeeping.look()  # which is done once a period
        eventually(lambda: lane.stats().lost_tickets == 1, "no reader has seen the ticket")
        for _ in range(2):
            metrics.write()
            assert value("lost_tickets_total") == before + 1
    metrics.write()


def test_a_lane_that_cannot_be_had_has_failed(by_hand: None) -> None:
    owner, producer = Owner(), producing(capacity=1 << 62)
    producer.try_out()
    Meter(owner).begin(lambda: producer.state, "lane")
    assert states() == {"failed": 1}


def test_a_launch_without_a_lane_says_so(by_hand: None) -> None:
    owner = Owner()
    Meter(owner).begin(lambda: "off", "lane")
    assert states() == {"off": 1}


def test_the_tokenizers_of_a_process_are_counted_each_until_it_is_let_go(by_hand: None) -> None:
    one, other = Owner(), Owner()
    Meter(one).begin(lambda: "unused", "lane")
    Meter(other).begin(lambda: "unused", "lane")
    assert states() == {"unused": 2}
    del one
    metrics.write()
    assert states() == {"unused": 1}
    del other
    metrics.write()
    assert states() == {} and metrics._meters == set()


def test_a_tokenizer_that_was_let_go_is_held_by_nothing_here(by_hand: None) -> None:
    """Its producer is not either, whose end is the lane's; also while the lane is still in the numbers."""
    owner, producer = Owner(), producing()
    producer.put(torch.ones(9))
    lane = producer.lane
    assert lane is not None
    meter = Meter(owner)
    meter.begin(partial(getattr, producer, "state"), "lane")
    meter.watch(lane)
    gone = weakref.ref(owner), weakref.ref(producer)
    del owner, producer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    eventually(lambda: lane.is_closed, "the lane's end")
    metrics.write()
    assert metrics._meters == set()


def test_a_lane_is_in_the_numbers_to_its_end_which_comes_after_its_tokenizers(by_hand: None) -> None:
    before, owner = numbers()["not_open"], Owner()
    meter = Meter(owner)
    meter.begin(lambda: "opening", "lane")
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane:
        meter.watch(lane)
        del owner
        for _ in range(2):
            metrics.write()
            assert states() == {} and numbers()["capacity"] == 8 * MIB
        assert isinstance(lane.put(torch.ones(9)), Refused)
    metrics.write()
    assert numbers()["not_open"] == before + 1
    metrics.write()
    assert numbers()["capacity"] == 0 and metrics._meters == set()


def test_a_lane_whose_tokenizer_went_before_it_was_watched_is_counted(by_hand: None) -> None:
    """A thread watches it, and may come late."""
    before, owner = numbers()["not_open"], Owner()
    meter = Meter(owner)
    meter.begin(lambda: "opening", "lane")
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane:
        assert isinstance(lane.put(torch.ones(9)), Refused)
    del owner
    metrics.write()
    meter.watch(lane)
    metrics.write()
    assert numbers()["not_open"] == before + 1
    assert states() == {} and metrics._meters == set()


def test_the_numbers_of_a_tokenizer_that_is_let_go_while_they_are_written_do_not_stay(
    often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners, extents = [Owner()], metrics.GAUGES["extents"]

    class LetGo:
        """Stands in for a metric: while it is written, the tokenizer is let go."""

        def set(self, value: float) -> None:
            if threading.current_thread().name == "mmlane-metrics":
                owners.clear()
            extents.set(value)

    monkeypatch.setitem(metrics.GAUGES, "extents", LetGo())
    Meter(owners[0]).begin(lambda: "unused", "lane")
    assert states() == {"unused": 1}
    eventually(lambda: not writing(), "the thread's end")
    assert owners == [] and states() == {}


def test_one_thread_writes_whatever_there_is(often: None) -> None:
    owner = Owner()
    meter = Meter(owner)
    meter.begin(lambda: "unused", "lane")
    with Lane({"dp0": 1}, capacity=8 * MIB) as one, Lane({"dp0": 1}, capacity=8 * MIB) as other:
        meter.watch(one)
        meter.watch(other)
        assert len(writing()) == 1
        eventually(lambda: numbers()["capacity"] == 16 * MIB, "both lanes' numbers")
    del owner


def test_a_write_that_fails_is_counted_and_tried_again(
    often: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "_said", set())
    before, extents = log.failures["metrics"], metrics.GAUGES["extents"]
    owner = Owner()
    meter = Meter(owner)

    class Full:
        """Stands in for a metric whose file cannot grow."""

        def set(self, value: float) -> None:
            raise OSError(28, "No space left on device")

    gone, lane = Lane({"dp0": 1}, capacity=8 * MIB), Lane({"dp0": 1}, capacity=8 * MIB)
    monkeypatch.setitem(metrics.GAUGES, "extents", Full())
    meter.watch(gone)
    meter.watch(lane)
    eventually(lambda: log.failures["metrics"] >= before + 3, "three failures")
    gone.close()
    eventually(lambda: list(meter.lanes) == [lane], "the closed lane to be let go")
    monkeypatch.setitem(metrics.GAUGES, "extents", extents)
    assert isinstance(lane.put(torch.ones(9)), Refused)
    refused = numbers()["not_open"]
    eventually(lambda: numbers()["not_open"] > refused - 1, "numbers again")
    eventually(lambda: value("failures_total", where="metrics") == log.failures["metrics"], "its count")
    lane.close()
    del owner
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "mmlane"]
    assert line.startswith("mmlane: metrics failed: OSError: [Errno 28] No space left on device; ")


def test_nothing_is_counted_twice_when_a_write_fails_in_the_middle(
    by_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, owner = numbers()["not_open"], Owner()
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane:
        assert isinstance(lane.put(torch.ones(9)), Refused)
        with monkeypatch.context() as full:
            full.setitem(metrics.GAUGES, "extents", None)
            Meter(owner).watch(lane)
        metrics.write()
        assert numbers()["not_open"] == before + 1
    metrics.write()


def test_an_import_that_failed_halfway_can_be_repeated() -> None:
    """A full disk is an error of the very making of a number, in prometheus_client's multiprocess mode."""
    program = """
import prometheus_client
made = prometheus_client.Gauge
def full(name, *args, **kwargs):
    if name == "mmlane_lane_tickets":
        raise OSError(28, "No space left on device")
    return made(name, *args, **kwargs)
prometheus_client.Gauge = full
try:
    import mmlane.transport.metrics
except OSError as error:
    print(error)
prometheus_client.Gauge = made
import mmlane.transport.metrics
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[Errno 28] No space left on device", "imported"]
