"""The records as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from bench.engine.cases import Case
from bench.engine.records import CALLS, LATENCY, MEMORY, Measure, Record, Results, median, ninetieth, values
from bench.transport.tables import Grid, render, write

REFERENCE = "off"
_MOST_RATIO = 100  # beyond, it says only that there is next to nothing to compare with


def grids(results: Results) -> Iterator[Grid]:
    """Those that have something to show."""
    for release in results.releases:
        cases = results.cases(release)
        alone = [case for case in cases if case.concurrency == 1]
        busy = [case for case in cases if case.concurrency > 1 and case.kind != "text"]
        made = (
            _grid(results, release, "latency, median / 90th percentile, ms", cases, [LATENCY]),
            _grid(results, release, "one request at a time: per request", alone, CALLS),
            _grid(results, release, "several at a time: per request, mean", busy, CALLS[:1] + CALLS[2:6:2]),
            _grid(results, release, "peak memory per request in flight", cases, MEMORY),
        )
        yield from (grid for grid in made if grid.rows)


def show(results: Results, console: Console) -> None:
    render(grids(results), console)


def markdown(results: Results, about: str) -> str:
    return write("In the engine", about, grids(results))


def _grid(results: Results, release: str, title: str, cases: Sequence[Case], measures: Sequence[Measure]) -> Grid:
    rows = []
    for case in cases:
        for place, measure in enumerate(measures):
            cells = [_cell(results, release, mode, case, measure, place == 0) for mode in results.modes]
            if any(cells):
                unit = f", {measure.unit}" if measure.unit else ""
                name = [] if len(measures) == 1 else [f"{measure.name}{unit}"]
                rows.append([str(case) if place == 0 else "", *name, *cells])
    words = ["request", *([""] if len(measures) > 1 else [])]
    return Grid(f"{release}: {title}", [*words, *results.modes], rows, len(words))


def _cell(results: Results, release: str, mode: str, case: Case, measure: Measure, first: bool) -> str:
    records = results.of(release, mode, case)
    found = values(records, measure)
    if not found:
        return next((_failure(r) for r in records if first and r.status != "ok"), "")
    middle = median(records, measure) or 0.0
    text = number(middle * measure.scale)
    if measure is LATENCY:
        text += f" / {number(ninetieth(found) * measure.scale)}"
    return f"{text}{_ratio(results, release, mode, case, measure, middle)}"


def _failure(record: Record) -> str:
    """In short; what a failed request was answered, by its status alone."""
    return f"{record.status}, {(record.reason or '').partition(':')[0]}"


def _ratio(results: Results, release: str, mode: str, case: Case, measure: Measure, found: float) -> str:
    reference = median(results.of(release, REFERENCE, case), measure)
    if not reference or mode == REFERENCE:
        return ""
    ratio = found / reference
    return f" ({ratio:.2f} x)" if ratio < _MOST_RATIO else f" (> {_MOST_RATIO} x)"


def number(value: float) -> str:
    """Three figures or so."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
