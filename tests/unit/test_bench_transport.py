"""The transport benchmark without processes: what is made of its records."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness.results import Record, absent
from bench.harness.sizes import JUDGED, parse_size, size
from bench.transport.cases import ONE_WAY
from bench.transport.goals import goals
from bench.transport.records import Results, cost, memcpy
from bench.transport.tables import grids
from bench.transport.ways import chosen
from mmlane.bench.case import Case
from mmlane.bench.rounds import Round
from mmlane.bench.workers import Failed, Refusal

CASE = Case(1, JUDGED)


def measured() -> Results:
    """The lane, with rounds of 4, 5 and 9 ms and copies of 4 ms; two ways without figures; messages."""
    uncounted = [Round(0.1, 0.004, 0.0, 0.0, 0.0, 0.0, 0.0, nbytes) for nbytes in (JUDGED, 2 * JUDGED)]
    rounds = [Round(s, 0.004, 0.002, 0.001, 0.0001, 0.0002, 0.0003, None) for s in (0.009, 0.004, 0.005)]
    (view,) = chosen(["lane view"])
    return Results(
        {"cores": 2},
        [
            Record(
                "one-way", Case(1, ONE_WAY), "lane view", figures={"one_way_s": [5e-5, 7e-5], "pipe_s": [1e-5]}
            ),
            cost(view, CASE, uncounted, rounds),
            absent("cost", CASE, "iceoryx2", Refusal("no room\nat all")),
            absent("cost", CASE, "engine 0.5.9", Failed("it ended: why\nthe log")),
            memcpy(CASE, rounds),
        ],
    )


def test_results_come_back(tmp_path: Path) -> None:
    measured().save(tmp_path / "transport.json")
    assert Results.load(tmp_path / "transport.json") == measured()


def test_tables() -> None:
    costs, one_way, _ = grids(measured())
    assert costs.title == "256 MiB, 1 reader"
    assert costs.rows == [
        [
            "lane view",
            *["5.000", "4.000", "9.000", "1.25", "2.000", "1.000", "0.100", "0.500", "100.0"],
            "2.00 x",
            "1 x",
        ],
        ["iceoryx2: skipped, no room", *[""] * 11],
        ["engine 0.5.9: failed, it ended: why", *[""] * 11],
        ["memcpy", "4.000", "4.000", "4.000", *[""] * 7, "1 x"],
    ]
    assert one_way.rows[0][:2] == ["lane view", "60"]


def test_goals() -> None:
    verdicts = {goal.text: (goal.found, goal.verdict) for goal in goals(measured())}
    assert verdicts["lane view over a plain copy, 256 MiB, 1 reader"] == ("1.25 x", "met")
    assert verdicts["lane view, memory over payload"] == ("2 x", "MISSED")
    assert verdicts["lane view, one way, 64 KiB, median"] == ("60 us", "met")
    assert {verdict for found, verdict in verdicts.values() if not found} == {"not measured"}


@pytest.mark.parametrize(("text", "nbytes"), [("64K", 1 << 16), ("16MiB", 1 << 24), ("1 GiB", 1 << 30)])
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes == parse_size(size(nbytes))


def test_a_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="wanted a multiple of 256 bytes"):
        parse_size("100")
