"""The records as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.transport.cases import ONE_WAY, Case, size
from bench.transport.peers import MEMCPY
from bench.transport.records import Record
from bench.transport.verdict import goals

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


@dataclass(frozen=True)
class Grid:
    """A table: rows of text under headings; the first `words` columns to the left, the others to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def grids(records: Sequence[Record]) -> Iterator[Grid]:
    costs = [r for r in records if r.measure == "cost"]
    for case in sorted({r.case for r in costs}):
        yield _case(case, [r for r in costs if r.case == case])
    if latencies := [r for r in records if r.measure == "one-way"]:
        yield _one_way(latencies)
    verdicts = [(goal.text, goal.wanted, goal.found, goal.verdict) for goal in goals(records)]
    yield Grid("Goals", ("goal", "wanted", "found", "verdict"), verdicts)


def show(records: Sequence[Record], console: Console) -> None:
    render(grids(records), console)


def markdown(records: Sequence[Record], about: str) -> str:
    return write("Transports", about, grids(records))


def render(tables: Iterable[Grid], console: Console) -> None:
    for grid in tables:
        table = Table(title=grid.title, title_justify="left")
        for number, heading in enumerate(grid.headings):
            table.add_column(heading, justify="left" if number < grid.words else "right")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def write(title: str, about: str, tables: Iterable[Grid]) -> str:
    """As Markdown."""
    parts = [f"# {title}\n\n{about}\n"]
    for grid in tables:
        alignment = ["---" if number < grid.words else "---:" for number in range(len(grid.headings))]
        lines = [grid.headings, alignment, *grid.rows]
        parts.append(f"## {grid.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _case(case: Case, records: Sequence[Record]) -> Grid:
    return Grid(str(case), _HEADINGS, [_row(r) for r in records])


def _row(record: Record) -> list[str]:
    if record.status != "ok":
        reason = (record.reason or "").splitlines()[0]
        return [f"{record.label}: {record.status}, {reason}", *[""] * (len(_HEADINGS) - 1)]
    free = None
    if record.free_reader_s is not None and record.free_producer_s is not None:
        free = record.free_reader_s + record.free_producer_s
    ratio = ""
    if record.median_s and record.memcpy_s and record.label != MEMCPY:
        ratio = f"{record.median_s / record.memcpy_s:.2f}"
    return [
        record.label,
        _ms(record.median_s),
        _ms(record.min_s),
        _ms(record.max_s),
        ratio,
        _ms(record.put_s),
        _ms(record.take_s),
        _ms(record.first_read_extra_s),
        _ms(free),
        _ms(record.cold_s),
        f"{record.memory_x:.2f} x" if record.memory_x is not None else "",
        f"{record.bytes_copied / record.nbytes:.0f} x" if record.bytes_copied is not None else "",
    ]


def _one_way(records: Sequence[Record]) -> Grid:
    rows = [
        [r.label, _us(r.median_s), _us(r.p99_s), _us(r.min_s), _us(r.pipe_s), str(r.rounds)]
        if r.status == "ok"
        else [f"{r.label}: {r.status}", *[""] * 5]
        for r in records
    ]
    title = f"One way, {size(ONE_WAY)}, 1 reader"
    return Grid(
        title, ("microseconds", "median", "99th percentile", "least", "bare pipe, median", "messages"), rows
    )


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3f}" if abs(seconds) < 0.01 else f"{seconds * 1e3:.1f}"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f}"
