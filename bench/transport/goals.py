"""The goals, each met or missed, and the ratios to keep, computed from the records and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from bench.harness.goals import Goal, over
from bench.harness.ratios import Spread, extremes
from bench.harness.sizes import JUDGED, size
from bench.releases import NEWEST
from bench.transport import records
from bench.transport.cases import FAN_OUT, ONE_WAY
from bench.transport.records import COST, Results
from bench.transport.ways import LATEST
from mmlane.bench.case import Case

_FLAT = 1.2  # what counts as not growing; medians of a few rounds vary by that much
_FIRST, _LAST = 1, 8  # readers


def goals(results: Results) -> Iterator[Goal]:
    def of(way: str, *figures: str, **case: int) -> float | None:
        judged = Case(**{"readers": 1, "nbytes": JUDGED, **case})
        found = [results.median(COST, judged, way, figure) for figure in figures]
        return None if None in found else sum(filter(None, found))

    at = size(JUDGED)
    for mode, limit in (("view", 1.3), ("cow", 3.5)):
        figure = over(of(f"lane {mode}", "cost_s"), of(f"lane {mode}", "memcpy_s"))
        yield Goal(f"lane {mode} over a plain copy, {at}, 1 reader", limit, figure)
    for engine, view, cow in ((NEWEST, 10, 5), ("0.5.12.post1", 25, 10)):
        for mode, least in (("view", view), ("cow", cow)):
            figure = over(of(f"engine {engine}", "cost_s"), of(f"lane {mode}", "cost_s"))
            yield Goal(f"engine {engine} over lane {mode}", least, figure, at_least=True)
    many, one = (of("lane view", "put_s", "free_producer_s", readers=readers) for readers in (_LAST, _FIRST))
    yield Goal(f"lane view, put and free, {_LAST} readers over {_FIRST}", _FLAT, over(many, one))
    figure = over(of("lane view", "put_s", n=FAN_OUT), of("lane view", "put_s"))
    yield Goal(f"lane view, put, n = {FAN_OUT} over n = 1", _FLAT, figure)
    for mode in ("view", "cow"):
        figure = over(of(f"lane {mode}", "memory_bytes"), JUDGED)
        yield Goal(f"lane {mode}, memory over payload", 1.05, figure)
    latency = results.median(records.ONE_WAY, Case(1, ONE_WAY), "lane view", "one_way_s")
    figure = None if latency is None else latency * 1e6
    yield Goal(f"lane view, one way, {size(ONE_WAY)}, median", 100, figure, " us")


def ratios(results: Results) -> dict[str, Spread | None]:
    """The lane over the newest engine and over a plain copy, in each case measured; spread over rounds."""
    found: dict[str, Spread | None] = {}
    for case in results.cases(COST):
        theirs = results.values(COST, case, LATEST, "cost_s")
        for mode in ("view", "cow"):
            way = f"lane {mode}"
            ours = results.values(COST, case, way, "cost_s")
            if ours and theirs:
                found[f"{case}: {way} over {LATEST}"] = extremes(ours).over(extremes(theirs))
            copy = results.median(COST, case, way, "memcpy_s")
            if ours and copy and mode == "view":
                found[f"{case}: {way} over memcpy"] = extremes(ours).over(Spread(copy, copy, copy))
    return found
