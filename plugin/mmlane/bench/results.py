"""What `mmlane bench` has found, as plain facts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmlane.bench.case import Case
from mmlane.bench.ways import MEMCPY, Way


@dataclass
class Outcome:
    """One way in one case: seconds of each round that counts; or `problem`, why there are none."""

    way: str
    label: str
    cost_s: list[float] = field(default_factory=list)
    put_s: list[float] = field(default_factory=list)
    memcpy_s: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.cost_s) if self.cost_s else None

    @property
    def put(self) -> float | None:
        return statistics.median(self.put_s) if self.put_s else None


@dataclass
class Comparison:
    """All ways in one case, to processes of one device."""

    case: Case
    device: str
    outcomes: list[Outcome]

    @classmethod
    def of(cls, case: Case, ways: Sequence[Way]) -> Comparison:
        return cls(case, ways[0].device, [Outcome(way.id, way.label) for way in ways])

    def __str__(self) -> str:
        return f"{self.case}{'' if self.device == 'cpu' else f', to {self.device}'}"

    def memcpy(self) -> Outcome:
        """The plain copy, over all ways' rounds."""
        times = [time for outcome in self.outcomes for time in outcome.memcpy_s]
        return Outcome(MEMCPY, MEMCPY, cost_s=times)

    def baseline(self) -> Outcome | None:
        """What the others are compared with besides memcpy: the engine as installed; to a device, the segment."""
        return self.outcomes[0] if len(self.outcomes) > 1 else None

    def ratios(self, one: Outcome) -> tuple[float | None, float | None]:
        """A way's median over that of memcpy, and over that of the baseline."""
        baseline = self.baseline()
        return over(one.median, self.memcpy().median), over(one.median, baseline.median if baseline else None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times in seconds."""
        baseline = self.baseline()
        ratios = {one.way: self.ratios(one) for one in self.outcomes}
        return {
            "bytes": self.case.nbytes,
            "readers": self.case.readers,
            "n": self.case.n,
            "device": self.device,
            "memcpy_s": self.memcpy().median,
            "baseline": baseline.way if baseline else None,
            "ways": [
                {
                    "way": one.way,
                    "label": one.label,
                    "cost_s": one.median,
                    "least_s": min(one.cost_s, default=None),
                    "most_s": max(one.cost_s, default=None),
                    "put_s": one.put,
                    "rounds": len(one.cost_s),
                    "over_memcpy": ratios[one.way][0],
                    "over_baseline": ratios[one.way][1],
                    "problem": one.problem or None,
                }
                for one in self.outcomes
            ],
        }


@dataclass
class Results:
    """A run. left_out: what was to be measured and was not, each with the reason. notes: what else to know."""

    comparisons: list[Comparison] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def has_failed(self) -> bool:
        """Whether some way could not be measured somewhere."""
        return any(one.problem for each in self.comparisons for one in each.outcomes)


def over(value: float | None, reference: float | None) -> float | None:
    """Their ratio; None where one is not there."""
    return value / reference if value is not None and reference else None
