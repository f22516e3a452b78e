"""An engine without the plugin and with it, servers of both in turn, asked one request at a time."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.engine.asking import Answered, per_request, read_notes, slowest
from bench.engine.records import REFERENCE, Measure
from bench.harness import command
from bench.harness.results import Record, Results
from bench.harness.tables import number, ratio
from bench.harness.turns import turns

MODES = (REFERENCE, "lane")
BLOCKED = Measure("blocked", "blocked", "ms", 1e3)
RECEIVED = Measure("received", "received", "ms", 1e3)
LATENCY = Measure("latency", "latency", "ms", 1e3)
HELD = Measure("held", "held / payload", "")

C = TypeVar("C")
# One server: the case, the plugin or None, and how many requests count.
Measuring = Callable[[C, Path | None, int], dict[str, list[float]]]


def parser(benchmark: str, doc: str | None) -> ArgumentParser:
    made = command.parser(benchmark, doc)
    made.add_argument("--requests", type=int, default=8, help="that count, on each server (8)")
    made.add_argument("--rounds", type=int, default=2, help="servers for each case and mode (2)")
    return made


def compare(
    results: Results[C],
    case: C,
    wheel: Path,
    options: Namespace,
    measure: Measuring[C],
    modes: Sequence[str] = MODES,
) -> None:
    """Measure a case on so many servers of each mode as `options` say, each with so many requests."""
    for _, mode in turns(modes, options.rounds):
        figures = measure(case, None if mode == REFERENCE else wheel, options.requests)
        results.records.append(Record("", case, mode, figures=figures))


def of_requests(notes: Path, answered: Sequence[Answered], ranks: int) -> dict[str, list[float]]:
    """For each request seconds, and for each rank and request the bytes of tensors and what is held over them."""
    noted = read_notes(notes)
    sums = per_request(noted, answered, 1)

    def counts(note: dict[str, Any]) -> bool:
        return note["what"] == "recv" and any(each.began <= note["began"] < each.ended for each in answered)

    received = [note for note in noted if counts(note)]
    return {
        "blocked": sums["send_s"],
        "received": slowest(sums, "recv", ranks),
        "latency": [each.took for each in answered],
        "bytes": [note["bytes"] for note in received],
        "held": [note["held"] / note["bytes"] for note in received],
    }


def rows(
    results: Results[C], case: C, measures: Sequence[Measure], modes: Sequence[str] = MODES
) -> Iterator[list[str]]:
    """One for each mode: medians, and in parentheses the ratio to the engine without the plugin, if it was run."""
    for mode in modes:
        cells = []
        for measure in measures:
            middle, off = (results.median("", case, each, measure.key) or 0.0 for each in (mode, REFERENCE))
            cells.append(number(middle * measure.scale) + ratio(middle, None if mode == REFERENCE else off))
        yield [str(case), mode, *cells]
