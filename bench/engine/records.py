"""The results: for each release, case and mode the figures, a value for each request or the mean of all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.engine.cases import Case
from bench.harness import results
from bench.harness.ratios import Spread, quartiles


@dataclass(frozen=True)
class Measure:
    """A figure per request; `scale` makes what is shown of what is recorded."""

    key: str
    name: str
    unit: str
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


REFERENCE = "off"  # the mode in which the plugin is not installed
_MIB = 1 / (1 << 20)
CALLS = (
    Measure("send_s", "blocked", "ms", 1e3),
    Measure("wrap_s", "wrapping", "ms", 1e3),
    Measure("recv0_s", "rank 0", "ms", 1e3),
    Measure("recv0_cpu", "rank 0 CPU", "ms", 1e3),
    Measure("recv1_s", "rank 1", "ms", 1e3),
    Measure("recv1_cpu", "rank 1 CPU", "ms", 1e3),
    Measure("bytes", "features", "MiB", _MIB),
    Measure("inline", "inline", "MiB", _MIB),
    Measure("send_faults", "faults, sending", ""),
    Measure("recv0_faults", "faults, rank 0", ""),
    Measure("recv1_faults", "faults, rank 1", ""),
    Measure("faults_tokenizer", "process faults, tokenizer", ""),
    Measure("faults_rank0", "process faults, rank 0", ""),
    Measure("faults_rank1", "process faults, rank 1", ""),
)
PUTS = (
    Measure("put_s", "puts", "ms", 1e3),
    Measure("commit_s", "committing", "ms", 1e3),
    Measure("copy_s", "copying", "ms", 1e3),
    Measure("copy_cpu", "copying, CPU", "ms", 1e3),
    Measure("copy_faults", "faults, copying", ""),
)
LATENCY = Measure("latency_s", "latency", "ms", 1e3)
MEMORY = (Measure("shared", "shared", "MiB", _MIB), Measure("all", "all", "MiB", _MIB))


@dataclass
class Results(results.Results[Case]):
    """`servers`: for each that was started, its release, mode, and what mmlane said."""

    servers: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def case_of(found: Any) -> Case:
        return Case(**found)


def ninetieth(found: Sequence[float]) -> float:
    return statistics.quantiles(found, n=10, method="inclusive")[-1] if len(found) > 1 else found[0]


def ratios(results: Results) -> dict[str, Spread | None]:
    """With mmlane over without it: latency, and what blocks the event loop where requests do not overlap."""
    found: dict[str, Spread | None] = {}
    for release in results.groups:
        for case in results.cases(release):
            for measure in (LATENCY, CALLS[0])[: 2 if case.concurrency == 1 else 1]:
                ours, theirs = (results.values(release, case, mode, measure.key) for mode in ("lane", "off"))
                if ours and theirs and case.n == 1:
                    name = f"{release}, {case}: {measure.name}, lane over off"
                    found[name] = quartiles(ours).over(quartiles(theirs))
    return found
