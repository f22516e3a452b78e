"""Draws the dashboard of docs/monitoring as a picture: python -m tools.dashboard_image DIRECTORY

DIRECTORY is that of a `tools.prometheus.Prometheus`, such as the one that tests/engine/test_monitoring.py leaves.
Needs the binary `prometheus`, and matplotlib (bench/requirements.txt).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from tools import monitoring
from tools.prometheus import Prometheus, Series

TARGET = monitoring.DIRECTORY.parent / "images" / "monitoring.png"
STEP_S = 1.0
COLUMNS = 3
MIB = float(1 << 20)
UNITS: Mapping[str, tuple[str, float]] = {"bytes": ("MiB", MIB), "Bps": ("MiB/s", MIB), "percentunit": ("%", 0.01)}


class Line(NamedTuple):
    """One of a graph: its numbers by the second."""

    name: str
    points: Mapping[int, float]


def draw(recorded: Path, target: Path) -> None:
    """Each graph of the dashboard over all that was recorded, with Grafana's variables filled in."""
    with Prometheus(recorded) as prometheus:
        start, end = prometheus.recorded()
        panels = {
            title: [(query, prometheus.query_range(query.expression, start, end, STEP_S)) for query in queries]
            for title, queries in groupby(monitoring.queries(), key=lambda query: query.panel)
        }
    panels = {title: found for title, found in panels.items() if any(query.unit for query, _ in found)}
    rows = -(-len(panels) // COLUMNS)
    figure, places = pyplot.subplots(rows, COLUMNS, figsize=(13, 2.5 * rows), layout="constrained", sharex=True)
    for axes, (title, found) in zip(places.flat, panels.items(), strict=True):
        lines = [_line(series, query, start) for query, all_series in found for series in all_series]
        _plot(axes, lines, round(end - start), is_stacked=found[0][0].is_stacked)
        axes.set_title(title, fontsize=10, loc="left")
        _finish(axes, found[0][0].unit)
    for axes in places[-1]:
        axes.set_xlabel("seconds", fontsize=8)
    figure.savefig(target, dpi=80)
    pyplot.close(figure)


def _line(series: Series, query: monitoring.Query, start: float) -> Line:
    _, one = UNITS.get(query.unit, ("", 1.0))
    points = {round(float(time) - start): float(number) / one for time, number in series["values"]}
    return Line(_legend(query.legend, series["metric"]), points)


def _plot(axes: Axes, lines: Sequence[Line], seconds: int, *, is_stacked: bool) -> None:
    if is_stacked:
        lines = [line for line in lines if any(line.points.values())]
        times = range(seconds + 1)
        heights = [[line.points.get(time, 0.0) for time in times] for line in lines]
        axes.stackplot(times, heights, labels=[line.name for line in lines], step="post", alpha=0.6)
    else:
        for line in lines:
            axes.plot(list(line.points), list(line.points.values()), ".-", ms=2, lw=1, label=line.name)


def _legend(text: str, labels: Mapping[str, str]) -> str:
    """As Grafana fills it in, without the engine's address: there is one engine."""
    for label, value in labels.items():
        text = text.replace(f"{{{{{label}}}}}", "" if label == "instance" else value)
    return text.strip() or "engine"


def _finish(axes: Axes, unit: str) -> None:
    name, _ = UNITS.get(unit, ("", 1.0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {name}"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="best")
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.dashboard_image", description=__doc__)
    parser.add_argument("recorded", type=Path, metavar="DIRECTORY")
    parser.add_argument("--target", type=Path, default=TARGET, help="the picture (%(default)s)")
    options: Any = parser.parse_args(arguments)
    draw(options.recorded, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
