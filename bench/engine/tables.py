"""The records as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.engine.cases import Case
from bench.engine.records import CALLS, LATENCY, MEMORY, PUTS, REFERENCE, Measure, Results, ninetieth
from bench.harness.tables import Grid, number, ratio


def grids(results: Results) -> Iterator[Grid]:
    """Those that have something to show."""
    for release in results.groups:
        cases = results.cases(release)
        alone = [case for case in cases if case.concurrency == 1]
        busy = [case for case in cases if case.concurrency > 1 and case.kind != "text"]
        made = (
            _grid(results, release, "latency, median / 90th percentile, ms", cases, [LATENCY]),
            _grid(results, release, "one request at a time: per request", alone, CALLS),
            _grid(results, release, "several at a time: per request, mean", busy, CALLS[:1] + CALLS[2:6:2]),
            _grid(results, release, "of that, puts into the lane: per request", [*alone, *busy], PUTS),
            _grid(results, release, "peak memory per request in flight", cases, MEMORY),
        )
        yield from (grid for grid in made if grid.rows)


def _grid(results: Results, release: str, title: str, cases: Sequence[Case], measures: Sequence[Measure]) -> Grid:
    rows = []
    for case in cases:
        for place, measure in enumerate(measures):
            cells = [_cell(results, release, mode, case, measure, place == 0) for mode in results.ways]
            if any(cells):
                name = [] if len(measures) == 1 else [str(measure)]
                rows.append([str(case) if place == 0 else "", *name, *cells])
    words = ["request", *([""] if len(measures) > 1 else [])]
    return Grid(f"{release}: {title}", [*words, *results.ways], rows, len(words))


def _cell(results: Results, release: str, mode: str, case: Case, measure: Measure, first: bool) -> str:
    found = results.values(release, case, mode, measure.key)
    middle = results.median(release, case, mode, measure.key)
    if middle is None:
        # In short; what a failed request was answered, by its status alone.
        problems = (r.problem.partition(":")[0] for r in results.of(release, case, mode) if r.status != "ok")
        return next(problems, "") if first else ""
    text = number(middle * measure.scale)
    if measure is LATENCY:
        text += f" / {number(ninetieth(found) * measure.scale)}"
    reference = None if mode == REFERENCE else results.median(release, case, REFERENCE, measure.key)
    return text + ratio(middle, reference)
