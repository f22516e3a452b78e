"""The records as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.harness import goals as wanted
from bench.harness.goals import over
from bench.harness.results import Record
from bench.harness.sizes import size
from bench.harness.tables import Grid
from bench.transport import cases
from bench.transport.goals import goals
from bench.transport.records import COST, ONE_WAY, Results
from bench.transport.ways import MEMCPY
from mmlane.bench.case import Case

_HEADINGS = (
    "ms",
    "cost",
    "from",
    "to",
    "x memcpy",
    "put",
    "take",
    "first read",
    "free",
    "cold",
    "memory",
    "copied",
)


def grids(results: Results) -> Iterator[Grid]:
    for case in results.cases(COST):
        yield Grid(str(case), _HEADINGS, [_row(record) for record in results.of(COST, case)])
    for case in results.cases(ONE_WAY):
        headings = ("microseconds", "median", "99th percentile", "least", "bare pipe, median", "messages")
        rows = [_one_way(record) for record in results.of(ONE_WAY, case)]
        yield Grid(f"One way, {size(cases.ONE_WAY)}, 1 reader", headings, rows)
    yield wanted.grid(goals(results))


def _row(record: Record[Case]) -> list[str]:
    if record.status != "ok":
        return [f"{record.way}: {record.problem}", *[""] * (len(_HEADINGS) - 1)]
    costs = record.figures["cost_s"]
    free = [record.median(part) for part in ("free_reader_s", "free_producer_s")]
    ratio = None if record.way == MEMCPY else over(record.median("cost_s"), record.median("memcpy_s"))
    memory, copied = (over(record.median(what), record.case.nbytes) for what in ("memory_bytes", "copied_bytes"))
    return [
        record.way,
        *map(_ms, (statistics.median(costs), min(costs), max(costs))),
        "" if ratio is None else f"{ratio:.2f}",
        *(_ms(record.median(part)) for part in ("put_s", "take_s", "first_read_extra_s")),
        _ms(None if None in free else sum(filter(None, free))),
        _ms(record.median("cold_s")),
        "" if memory is None else f"{memory:.2f} x",
        "" if copied is None else f"{copied:.0f} x",
    ]


def _one_way(record: Record[Case]) -> list[str]:
    if record.status != "ok":
        return [f"{record.way}: {record.problem}", *[""] * 5]
    times = record.figures["one_way_s"]
    shown = (statistics.median(times), statistics.quantiles(times, n=100)[-1], min(times))
    bare = statistics.median(record.figures["pipe_s"])
    return [record.way, *(f"{seconds * 1e6:.0f}" for seconds in (*shown, bare)), str(len(times))]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3f}" if abs(seconds) < 0.01 else f"{seconds * 1e3:.1f}"
