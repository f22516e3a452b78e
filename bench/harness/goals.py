"""What is wanted of figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.harness.tables import Grid


@dataclass(frozen=True)
class Goal:
    """`figure` is None when the records do not hold what it takes."""

    text: str
    limit: float
    figure: float | None
    unit: str = " x"
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        met = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        return "met" if met else "MISSED"

    @property
    def found(self) -> str:
        return "" if self.figure is None else f"{self.figure:.3g}{self.unit}"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"


def grid(goals: Iterable[Goal], note: str = "") -> Grid:
    """`note`: what kind of run it was, in place of verdicts."""
    rows = [(goal.text, goal.wanted, goal.found, note or goal.verdict) for goal in goals]
    return Grid(f"Goals ({note})" if note else "Goals", ("goal", "wanted", "found", "verdict"), rows)


def over(part: float | None, whole: float | None) -> float | None:
    """The ratio of two figures, where both were measured."""
    return part / whole if part is not None and whole else None
