"""The results: one record for each release, mode, round and case."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.engine.cases import Case
from bench.ratios import Spread, quartiles


@dataclass(frozen=True)
class Measure:
    """A figure per request; `scale` makes what is shown of what is recorded."""

    key: str
    name: str
    unit: str
    scale: float = 1.0


MIB = 1 / (1 << 20)
CALLS = (
    Measure("send_s", "blocked", "ms", 1e3),
    Measure("wrap_s", "wrapping", "ms", 1e3),
    Measure("recv0_s", "rank 0", "ms", 1e3),
    Measure("recv0_cpu", "rank 0 CPU", "ms", 1e3),
    Measure("recv1_s", "rank 1", "ms", 1e3),
    Measure("recv1_cpu", "rank 1 CPU", "ms", 1e3),
    Measure("bytes", "features", "MiB", MIB),
    Measure("inline", "inline", "MiB", MIB),
    Measure("send_faults", "faults, sending", ""),
    Measure("recv0_faults", "faults, rank 0", ""),
    Measure("recv1_faults", "faults, rank 1", ""),
    Measure("faults_tokenizer", "process faults, tokenizer", ""),
    Measure("faults_rank0", "process faults, rank 0", ""),
    Measure("faults_rank1", "process faults, rank 1", ""),
)
LATENCY = Measure("latency_s", "latency", "ms", 1e3)
MEMORY = (Measure("shared", "shared", "MiB", MIB), Measure("all", "all", "MiB", MIB))


@dataclass(frozen=True)
class Record:
    """`figures`: by the key of a measure, a value for each request, or one that is the mean over requests.

    status: `ok`; `failed`, the server lives on; `died`, it does not; `not tried`, it died of that before.
    """

    release: str
    mode: str
    round: int
    case: Case
    status: Literal["ok", "failed", "died", "not tried"] = "ok"
    reason: str | None = None
    requests: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Results:
    """All of a run. `servers`: for each that was started, its release, mode, and what mmlane said."""

    machine: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    servers: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text())
        records = [Record(**{**record, "case": Case(**record["case"])}) for record in found["records"]]
        return cls(found["machine"], records, found["servers"])

    @property
    def releases(self) -> list[str]:
        return list(dict.fromkeys(record.release for record in self.records))

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(record.mode for record in self.records))

    def cases(self, release: str) -> list[Case]:
        return list(dict.fromkeys(record.case for record in self.records if record.release == release))

    def of(self, release: str, mode: str, case: Case) -> list[Record]:
        """What the rounds found."""
        return [r for r in self.records if (r.release, r.mode, r.case) == (release, mode, case)]


def values(records: Iterable[Record], measure: Measure) -> list[float]:
    """What is recorded for one measure, over all rounds that have it."""
    return [value for r in records if r.status == "ok" for value in r.figures.get(measure.key, ())]


def median(records: Iterable[Record], measure: Measure) -> float | None:
    found = values(records, measure)
    return statistics.median(found) if found else None


def ninetieth(found: Sequence[float]) -> float:
    return statistics.quantiles(found, n=10, method="inclusive")[-1] if len(found) > 1 else found[0]


def ratios(results: Results) -> dict[str, Spread | None]:
    """With mmlane over without it: latency, and what blocks the event loop where requests do not overlap."""
    found: dict[str, Spread | None] = {}
    for release in results.releases:
        for case in results.cases(release):
            for measure in (LATENCY, CALLS[0])[: 2 if case.concurrency == 1 else 1]:
                ours, theirs = (values(results.of(release, mode, case), measure) for mode in ("lane", "off"))
                if ours and theirs and case.n == 1:
                    name = f"{release}, {case}: {measure.name}, lane over off"
                    found[name] = quartiles(ours).over(quartiles(theirs))
    return found
