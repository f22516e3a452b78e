"""What `mmlane bench` has found: as tables, as JSON, as a picture; and how far it is."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from mmlane import __version__, host
from mmlane.bench.results import Comparison, Outcome, Results
from mmlane.bench.ways import MEMCPY
from mmlane.cli.units import size

if TYPE_CHECKING:
    from mmlane.bench.installed_torch import Torch
    from mmlane.bench.need import Need

READING = """\
ms: from before a feature is sent until every reader has read it, less a second reading of it, and what freeing it
takes; all samples together. put: how long the sending process, such as a tokenizer, was busy with it. Both are
medians of as many rounds. docs/benchmarks.md tells more."""
_TO_DEVICE = "To a GPU: until every reader has the feature there, and then until it is freed."


class Progress:
    """A bar on standard error, if that is a terminal; it goes by the time that may be used."""

    def __init__(self, seconds: float) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=seconds)
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """What is done now."""
        self._bar.update(self._task, description=what, completed=time.monotonic() - self._began)


def render(results: Results, engine: str | None, torch: Torch | None, out: Console) -> None:
    """The tables, what was left out, and what else is to be known."""
    if results.comparisons:
        out.print(Text(_title(engine, torch), style="bold"))
        for device, comparisons in groupby(results.comparisons, key=lambda one: one.device):
            out.print(_table(list(comparisons)))
            if device != "cpu":
                out.print(Text(_TO_DEVICE))
        out.print(Text(READING))
    for line in results.notes:
        out.print(Text(f"note: {line}"))
    for line in results.left_out:
        out.print(Text(f"left out: {line}", style="yellow"))


def _title(engine: str | None, torch: Torch | None) -> str:
    parts = [f"mmlane {__version__}"]
    if engine is not None:
        parts.append(f"sglang {engine}")
    if torch is not None:
        parts.append(f"torch {torch.version}" + (f" on {torch.gpu}" if torch.gpu else ""))
    return ", ".join([*parts, f"{len(os.sched_getaffinity(0))} cores, {size(host.memory().total)}"])


def _table(comparisons: list[Comparison]) -> Table:
    baseline = comparisons[0].baseline()
    against = [] if baseline is None else [f"x {baseline.label}"]
    table = Table()
    table.add_column("")
    for heading in ("ms", "least", "most", "x memcpy", *against, "put, ms", "rounds"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        table.add_section()
        table.add_row(Text(str(comparison), style="bold"))
        for outcome in [*comparison.outcomes, comparison.memcpy()]:
            table.add_row(*_row(comparison, outcome, ratio=bool(against)))
    return table


def _row(comparison: Comparison, one: Outcome, *, ratio: bool) -> Iterator[str]:
    over_memcpy, over_baseline = comparison.ratios(one)
    yield f"  {one.label}" if not one.problem else f"  {one.label}: {one.problem.partition(chr(10))[0]}"
    yield _ms(one.median)
    yield _ms(min(one.cost_s, default=None))
    yield _ms(max(one.cost_s, default=None))
    yield _times(over_memcpy)
    if ratio:
        yield _times(over_baseline) if one.way != MEMCPY else ""
    yield _ms(one.put)
    yield str(len(one.cost_s)) if one.way != MEMCPY and one.cost_s else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _figures(seconds * 1e3)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{_figures(ratio)} x"


def _figures(value: float) -> str:
    """Two figures or three, or more of a large number."""
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def as_json(
    results: Results, engine: str | None, torch: Torch | None, needs: Need | None, error: str, code: int
) -> str:
    """Everything, in one object. A key is always there; its value is null where there is nothing to tell."""
    found: dict[str, Any] = {
        "mmlane": __version__,
        "exit_code": code,
        "error": error or None,
        "engine": engine,
        "torch": torch and torch.version,
        "gpu": torch and torch.gpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": host.memory().total,
        "needs": needs and asdict(needs),
        "comparisons": [comparison.as_dict() for comparison in results.comparisons],
        "notes": results.notes,
        "left_out": results.left_out,
    }
    return json.dumps(found, indent=2)


def draw(results: Results, path: Path) -> None:
    """The costs as bars, on a logarithmic scale. Needs matplotlib. Raises OSError, ValueError as that does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(
        dict.fromkeys(one.label for each in results.comparisons for one in [*each.outcomes, each.memcpy()])
    )
    wide = 0.8 / len(labels)
    _, axes = pyplot.subplots(figsize=(2 + 1.6 * len(results.comparisons), 4.5))
    for number, label in enumerate(labels):
        bars = {
            at + number * wide: one.median * 1e3
            for at, each in enumerate(results.comparisons)
            for one in [*each.outcomes, each.memcpy()]
            if one.label == label and one.median is not None
        }
        axes.bar(list(bars), list(bars.values()), wide, label=label, color="black" if label == MEMCPY else None)
    middle = [at + 0.4 - wide / 2 for at in range(len(results.comparisons))]
    axes.set_xticks(middle, [str(each).replace(", ", "\n") for each in results.comparisons])
    axes.set_yscale("log")
    axes.set_ylabel("ms, median")
    axes.set_title("What it costs to hand a feature to its readers")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    pyplot.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close()
