"""The results: what each mode took and answered, and the table that is made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.transport.tables import Grid

REFERENCE = "off"


@dataclass(frozen=True)
class Record:
    """One kind of request in one mode: seconds and texts of each round."""

    mode: str
    case: str
    seconds: list[float] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)


@dataclass
class Results:
    """All of a run. By mode: `lanes`, as in `mmlane status --json`, afterwards; `left`, new names in /dev/shm."""

    machine: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    lanes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text())
        records = [Record(**record) for record in found["records"]]
        return cls(found["machine"], records, found["lanes"], found["left"])

    @property
    def modes(self) -> Sequence[str]:
        return list(dict.fromkeys(record.mode for record in self.records))

    def of(self, mode: str, case: str) -> Record | None:
        return next((r for r in self.records if (r.mode, r.case) == (mode, case)), None)


def table(results: Results) -> Grid:
    """Medians in ms, ratios to `off`, and whether its texts are the same."""
    others = [mode for mode in results.modes if mode != REFERENCE]
    headings = ["request", *(f"{mode}, ms" for mode in results.modes)]
    headings += [heading for mode in others for heading in (f"{mode} / {REFERENCE}", "texts")]
    cases = dict.fromkeys(record.case for record in results.records)
    return Grid("Engine on a GPU", headings, [_row(results, case, others) for case in cases])


def _row(results: Results, case: str, others: Sequence[str]) -> list[str]:
    row = [case, *(_ms(results.of(mode, case)) for mode in results.modes)]
    reference = results.of(REFERENCE, case)
    for mode in others:
        record = results.of(mode, case)
        if reference is None or record is None:
            row += ["", ""]
            continue
        ratio = statistics.median(record.seconds) / statistics.median(reference.seconds)
        row += [f"{ratio:.2f}", "the same" if record.texts == reference.texts else "DIFFERENT"]
    return row


def _ms(record: Record | None) -> str:
    return "" if record is None else f"{statistics.median(record.seconds) * 1e3:.1f}"


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
