"""The numbers of /metrics are those of the lanes, added up; what only grows never counts twice."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from prometheus_client import REGISTRY  # noqa: E402

from mmlane.lane import Lane, Refused  # noqa: E402
from mmlane_patches import metrics  # noqa: E402


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"mmlane_{name}", labels) or 0.0


def numbers() -> dict[str, float]:
    return {
        "capacity": value("lane_bytes", kind="capacity"),
        "expected": value("lane_readers", kind="expected"),
        "joined": value("lane_readers", kind="joined"),
        "not_open": value("fallbacks_total", cause="not_open"),
        "puts": value("puts_total"),
    }


def test_lanes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(metrics, "_keep_writing", lambda: started.append(1))
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
    assert len(started) == 1  # one thread, whatever the number of lanes
