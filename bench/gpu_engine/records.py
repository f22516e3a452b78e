"""The results: for each kind of request and mode the seconds of each round, and the table that is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness import results
from bench.harness.goals import over
from bench.harness.tables import Grid

REFERENCE = "off"
SECONDS = "seconds"


@dataclass
class Results(results.Results[str]):
    """By mode: `texts`, by case those of each round; `lanes`, as in `mmlane status --json`, afterwards; `left`,
    new names in /dev/shm."""

    texts: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)
    lanes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def seconds(self, mode: str, case: str) -> float | None:
        return self.median("", case, mode, SECONDS)


def table(results: Results) -> Grid:
    """Medians in ms, ratios to `off`, and whether its texts are the same."""
    others = [mode for mode in results.ways if mode != REFERENCE]
    headings = ["request", *(f"{mode}, ms" for mode in results.ways)]
    headings += [heading for mode in others for heading in (f"{mode} / {REFERENCE}", "texts")]
    return Grid("Engine on a GPU", headings, [_row(results, case, others) for case in results.cases("")])


def _row(results: Results, case: str, others: Sequence[str]) -> list[str]:
    row = [case]
    for mode in results.ways:
        seconds = results.seconds(mode, case)
        row.append("" if seconds is None else f"{seconds * 1e3:.1f}")
    for mode in others:
        ratio = over(results.seconds(mode, case), results.seconds(REFERENCE, case))
        if ratio is None:
            row += ["", ""]
            continue
        same = results.texts[mode][case] == results.texts[REFERENCE][case]
        row += [f"{ratio:.2f}", "the same" if same else "DIFFERENT"]
    return row


def about(results: Results) -> str:
    """The machine, and what was there afterwards, in a few lines."""
    machine = results.machine
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, sglang {machine['sglang']};"
        f" {machine['cores']} cores, {machine['memory_bytes'] >> 30} GiB, Linux {machine['kernel']};"
        f" mmlane {machine['commit']}, {machine['began']}.",
        "TP 1, the model by pure-torch paths, its weights tiny and random: `bench/gpu_engine/__init__.py`.",
    ]
    for mode, lanes in results.lanes.items():
        for lane in lanes:
            said = lane["stats"] or {"problem": lane["problem"]}
            lines.append(f"{mode}, the lane afterwards: {json.dumps(said)}.")
    for mode, names in results.left.items():
        lines.append(f"{mode}, new in /dev/shm afterwards: {', '.join(names) or 'nothing'}.")
    return "\n".join(lines)
