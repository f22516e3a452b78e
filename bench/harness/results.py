"""The results of a run: records, kept as JSON, from which tables, plots, goals and ratios are made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmlane.bench.workers import Refusal

C = TypeVar("C")
R = TypeVar("R", bound="Results[Any]")


@dataclass(frozen=True)
class Record(Generic[C]):
    """What was measured of one case by one way; `group`: what the case belongs to, a measure or a release.

    `figures`: by their name, a value for each round or request. status: `ok`; or there is a reason and no figures:
    `skipped`; `failed`; and where an engine died, `died`, or `not tried`, it died of that before.
    """

    group: str
    case: C
    way: str
    status: str = "ok"
    reason: str | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)

    def median(self, figure: str) -> float | None:
        found = self.figures.get(figure)
        return statistics.median(found) if found else None

    @property
    def problem(self) -> str:
        """Status and reason, in a line."""
        line = (self.reason or "").partition("\n")[0]
        return f"{self.status}, {line}"


def absent(group: str, case: C, way: str, problem: Exception) -> Record[C]:
    """A way without figures, and why."""
    status = "skipped" if isinstance(problem, Refusal) else "failed"
    return Record(group, case, way, status, str(problem))


@dataclass
class Results(Generic[C]):
    """All of a run. `machine`: what is known of it, and with what options it ran."""

    machine: dict[str, Any] = field(default_factory=dict)
    records: list[Record[C]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def load(cls: type[R], path: Path) -> R:
        found = json.loads(path.read_text())
        records = [Record(**{**record, "case": cls.case_of(record["case"])}) for record in found.pop("records")]
        return cls(records=records, **found)

    @staticmethod
    def case_of(found: Any) -> Any:
        """A case as it was before it was kept as JSON."""
        return found

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(record.group for record in self.records))

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(record.way for record in self.records))

    def cases(self, group: str) -> list[C]:
        return list(dict.fromkeys(record.case for record in self.records if record.group == group))

    def of(self, group: str, case: C, way: str | None = None) -> list[Record[C]]:
        """Of one way, where one is named; several records of it are rounds."""
        return [r for r in self.records if (r.group, r.case) == (group, case) and way in (None, r.way)]

    def values(self, group: str, case: C, way: str, figure: str) -> Sequence[float]:
        """What is recorded for one figure, over all rounds that have it."""
        return [value for record in self.of(group, case, way) for value in record.figures.get(figure, ())]

    def median(self, group: str, case: C, way: str, figure: str) -> float | None:
        found = self.values(group, case, way, figure)
        return statistics.median(found) if found else None
