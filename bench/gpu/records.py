"""The results: a record for each measure, case and way, and the goals, computed from them and nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.ways import LANE_PINNED, PAGEABLE, POOL, POOL_AS_IT_COMES, SEGMENT, TORCH_PINNED
from bench.ratios import Spread, extremes
from bench.transport.cases import JUDGED, size
from bench.transport.group import Refusal
from bench.transport.verdict import Goal

REHEARSAL = "rehearsal, not a measurement"
COPY = "pageable copy"
PEERS = {  # what the others are compared with
    "contexts": (POOL_AS_IT_COMES,),
    "h2d": (TORCH_PINNED, PAGEABLE),
    "concurrent": (SEGMENT, TORCH_PINNED),
    "registration": (COPY,),
    "first byte": (POOL, SEGMENT),
}


@dataclass(frozen=True)
class Record:
    """`figures`: by their name with its unit, a value for each round; the first of them is what is compared.

    nbytes: of the load. status: `ok`, or `skipped` or `failed`, with a reason.
    """

    measure: str
    case: str
    way: str
    nbytes: int = 0
    status: str = "ok"
    reason: str | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Of the figure that is compared."""
        found = next(iter(self.figures.values()), None)
        return statistics.median(found) if found else None


def absent(measure: str, case: str, way: str, problem: Exception) -> Record:
    """A way without figures, and why."""
    status = "skipped" if isinstance(problem, Refusal) else "failed"
    return Record(measure, case, way, status=status, reason=str(problem))


@dataclass
class Results:
    """All of a run. `note` says so where it is a rehearsal."""

    note: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text())
        return cls(found["note"], found["machine"], [Record(**record) for record in found["records"]])

    def cases(self, measure: str) -> Mapping[str, Sequence[Record]]:
        """The records of a measure, by case."""
        cases: dict[str, list[Record]] = {}
        for record in self.records:
            if record.measure == measure:
                cases.setdefault(record.case, []).append(record)
        return cases

    def ratio(self, record: Record, peer: str) -> float | None:
        """A record's median over that of a peer in the same case; None in a rehearsal."""
        whole = next((r.median for r in self.cases(record.measure)[record.case] if r.way == peer), None)
        if self.note or record.median is None or not whole:
            return None
        return record.median / whole


def goals(results: Results) -> list[Goal]:
    """What is wanted of the pinned zone; without figures in a rehearsal."""
    at = results.cases("h2d").get(size(JUDGED), ())
    pinned = next((record for record in at if record.way == LANE_PINNED), None)

    def over(peer: str) -> float | None:
        return None if pinned is None else results.ratio(pinned, peer)

    what = f"{size(JUDGED)} to the device, {LANE_PINNED} over"
    return [
        Goal(f"{what} {TORCH_PINNED}, the peak", 0.9, over(TORCH_PINNED), " x", at_least=True),
        Goal(f"{what} {PAGEABLE}", 2.0, over(PAGEABLE), " x", at_least=True),
    ]


def ratios(results: Results) -> dict[str, Spread | None]:
    """The pinned lane over what it is compared with, in each case, on this GPU; spread over rounds."""
    gpu = results.machine["gpus"][0]["name"]
    found: dict[str, Spread | None] = {}
    for measure, peers in PEERS.items():
        for case, records in results.cases(measure).items():
            ways = {record.way: record for record in records if record.figures}
            for peer in peers:
                if LANE_PINNED in ways and peer in ways:
                    what, ours = next(iter(ways[LANE_PINNED].figures.items()))
                    theirs = next(iter(ways[peer].figures.values()))
                    name = f"{gpu}, {measure}, {case}: {what}, {LANE_PINNED} over {peer}"
                    found[name] = extremes(ours).over(extremes(theirs))
    return found
