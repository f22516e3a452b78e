"""What a quick run leaves for later ones: each benchmark puts its ratios on one line, bench/out/ratios.json.

`tools.ratios` compares that line with the last that git has. A ratio's spread is what its two sides allow at most:
the least of ours over the most of theirs, and the other way round.

`bench.startup` and `bench.text` put theirs in every run: a quick one measures the same there as a whole one. All
trees with uncommitted changes on one commit share a line, so `tools.ratios` does not keep such a line.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.machine import facts

NAME = "ratios.json"


class Spread(NamedTuple):
    """What was measured of one thing, or the ratio of two."""

    median: float
    least: float
    most: float

    def over(self, other: Spread) -> Spread | None:
        """None where nothing can be divided by the other, or one is a difference that came out negative."""
        if min(self.least, other.least) <= 0:
            return None
        return Spread(self.median / other.median, self.least / other.most, self.most / other.least)


def quartiles(values: Sequence[float]) -> Spread:
    """The median and the quartiles of many values; of a single one, that."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    least, median, most = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, least, most)


def extremes(values: Sequence[float]) -> Spread:
    """The median, the least and the most of a few values."""
    return Spread(statistics.median(values), min(values), max(values))


def put(benchmark: str, ratios: Mapping[str, Spread | None], out: Path) -> Path:
    """Add the ratios of one benchmark to the line of this commit and machine; they replace its own earlier ones.

    The line begins anew on another commit, or another machine.
    """
    path = out / NAME
    known = facts()
    line: dict[str, Any] = {"commit": known["commit"], "machine": machine(known), "when": known["began"]}
    if path.is_file():
        before = json.loads(path.read_text())
        if (before["commit"], before["machine"]) == (line["commit"], line["machine"]):
            line = before
    kept = {name: of for name, of in line.get("ratios", {}).items() if not name.startswith(f"{benchmark}: ")}
    new = {f"{benchmark}: {name}": [_short(x) for x in of] for name, of in ratios.items() if of is not None}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**line, "ratios": {**kept, **new}}) + "\n")
    return path


def machine(known: Mapping[str, Any]) -> str:
    """What makes ratios of two runs comparable."""
    return f"{known['cores']} cores, {known['processor']}, {known['memory_bytes'] / (1 << 30):.0f} GiB"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
