"""The numbers of /metrics: those of the lanes, added up, and what tokenizers have a lane; whatever fails there."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")


from mmlane import __version__  # noqa: E402
from mmlane.lane import Lane, Reader, Refused, status  # noqa: E402
from mmlane_patches import guard, lanes, metrics  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402

MIB = 1 << 20


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"mmlane_{name}", labels) or 0.0


def numbers() -> dict[str, float]:
    return {
        "capacity": value("lane_bytes", kind="capacity"),
        "expected": value("lane_readers", kind="expected"),
        "joined": value("lane_readers", kind="joined"),
        "not_open": value("fallbacks_total", cause="not_open"),
        "puts": value("puts_total"),
    }


def states() -> dict[str, float]:
    """The states that tokenizers are in, and how many in each."""
    return {state: count for state in metrics.STATES if (count := value("lanes", state=state))}


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


def test_lanes_are_added_up(by_hand: None) -> None:
    before = numbers()
    with Lane({"dp0": 2}, capacity=8 << 20) as one, Lane({"dp0": 1, "dp1": 1}, capacity=4 << 20) as other:
        for lane in (one, other):
            assert isinstance(lane.put(torch.ones(9)), Refused)
            metrics.watch(lane)
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


def test_who_runs_and_how_the_lane_is_can_be_seen_from_the_start_on(
    by_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMLANE", "arena")
    owner, producer = Owner(), lanes.Producer({"dp0": 1}, capacity=8 * MIB)
    metrics.begin(owner, lambda: producer.state)
    assert value("info", version=__version__, mode="arena") == 1
    assert states() == {"unused": 1}
    assert producer.put(torch.ones(9))[0] is None
    metrics.write()
    assert states() == {"opening": 1}
    reader = Reader("dp0", 0)
    assert producer.lane is not None
    reader.join(producer.lane.invitation)
    assert producer.lane.wait_open(DEADLINE)
    metrics.watch(producer.lane)
    assert states() == {"open": 1} and numbers()["joined"] == 1
    before = value("fallbacks_total", cause="off")
    status.switch(producer.lane.name, off=True)
    assert producer.put(torch.ones(9)) == (None, None)
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


def test_lost_tickets_are_counted(by_hand: None) -> None:
    before = value("lost_tickets_total")
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane, Reader("dp0", 0) as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        metrics.watch(lane)
        ticket = lane.put(torch.ones(9))
        assert isinstance(ticket, bytes)
        lane.recall(ticket)
        lane.look()  # which is done once a period
        eventually(lambda: lane.stats().lost_tickets == 1, "no reader has seen the ticket")
        for _ in range(2):
            metrics.write()
            assert value("lost_tickets_total") == before + 1
    metrics.write()


def test_a_lane_that_cannot_be_had_has_failed(by_hand: None) -> None:
    owner, producer = Owner(), lanes.Producer({"dp0": 1}, capacity=1 << 62)
    producer.try_out()
    metrics.begin(owner, lambda: producer.state)
    assert states() == {"failed": 1}


def test_a_launch_without_a_lane_says_so(by_hand: None) -> None:
    owner = Owner()
    metrics.begin(owner, lambda: "off")
    assert states() == {"off": 1}


def test_one_thread_writes_whatever_there_is(often: None) -> None:
    owner = Owner()
    metrics.begin(owner, lambda: "unused")
    with Lane({"dp0": 1}, capacity=8 * MIB) as one, Lane({"dp0": 1}, capacity=8 * MIB) as other:
        metrics.watch(one)
        metrics.watch(other)
        assert len(writing()) == 1
        eventually(lambda: numbers()["capacity"] == 16 * MIB, "both lanes' numbers")
    del owner


def test_a_write_that_fails_is_counted_and_tried_again(
    often: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_said", set())
    before, extents = guard.failures["metrics"], metrics.EXTENTS

    class Full:
        """Stands in for a metric whose file cannot grow."""

        def set(self, value: float) -> None:
            raise OSError(28, "No space left on device")

    gone, lane = Lane({"dp0": 1}, capacity=8 * MIB), Lane({"dp0": 1}, capacity=8 * MIB)
    monkeypatch.setattr(metrics, "EXTENTS", Full())
    metrics.watch(gone)
    metrics.watch(lane)
    eventually(lambda: guard.failures["metrics"] >= before + 3, "three failures")
    gone.close()
    eventually(lambda: list(metrics._watched) == [lane], "the closed lane to be let go")
    monkeypatch.setattr(metrics, "EXTENTS", extents)
    assert isinstance(lane.put(torch.ones(9)), Refused)
    refused = numbers()["not_open"]
    eventually(lambda: numbers()["not_open"] > refused - 1, "numbers again")
    eventually(lambda: value("failures_total", where="metrics") == guard.failures["metrics"], "its count")
    lane.close()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "mmlane"]
    assert line.startswith("mmlane: metrics failed: OSError: [Errno 28] No space left on device; ")


def test_nothing_is_counted_twice_when_a_write_fails_in_the_middle(
    by_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = numbers()["not_open"]
    with Lane({"dp0": 1}, capacity=8 * MIB) as lane:
        assert isinstance(lane.put(torch.ones(9)), Refused)
        with monkeypatch.context() as full:
            full.setattr(metrics, "EXTENTS", None)
            metrics.watch(lane)
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
    import mmlane_patches.metrics
except OSError as error:
    print(error)
prometheus_client.Gauge = made
import mmlane_patches.metrics
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[Errno 28] No space left on device", "imported"]
