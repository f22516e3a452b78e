"""Pictures: what is the same in all. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.harness.sizes import size

__all__ = ["in_steps", "line", "pyplot", "write"]


def line(axes: Axes, points: Mapping[int, Sequence[float]], style: str = "o-", **looks: Any) -> None:
    """Medians, with bars from the least to the most, by what is along the axis."""
    middle = [statistics.median(values) for values in points.values()]
    below = [m - min(values) for m, values in zip(middle, points.values(), strict=True)]
    above = [max(values) - m for m, values in zip(middle, points.values(), strict=True)]
    axes.errorbar(list(points), middle, yerr=[below, above], fmt=style, capsize=3, **looks)


def in_steps(axes: Axes, steps: Sequence[int], label: str, *, are_bytes: bool = True) -> None:
    """The axis along which a line goes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [size(step) if are_bytes else str(step) for step in steps])
    axes.set_xlabel(label)


def write(axes: Axes, title: str, path: Path, **legend: Any) -> Path:
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", **legend)
    pyplot.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close()
    return path
