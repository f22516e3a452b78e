"""Tables, for the terminal and as Markdown, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # a narrow table is not readable
_MOST_RATIO = 100  # beyond, it says only that there is next to nothing to compare with


@dataclass(frozen=True)
class Grid:
    """A table: rows of text under headings; the first `words` columns to the left, the others to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def console() -> Console:
    """For tables and plain lines, which are not folded."""
    made = Console(highlight=False, markup=False, soft_wrap=True)
    made.width = max(made.width, _WIDTH)
    return made


def render(grids: Iterable[Grid], out: Console) -> None:
    for grid in grids:
        table = Table(title=grid.title, title_justify="left")
        for number, heading in enumerate(grid.headings):
            table.add_column(heading, justify="left" if number < grid.words else "right")
        for row in grid.rows:
            table.add_row(*row)
        out.print(table, soft_wrap=False)


def markdown(title: str, about: str, grids: Iterable[Grid]) -> str:
    parts = [f"# {title}\n\n{about}\n"]
    for grid in grids:
        alignment = ["---" if number < grid.words else "---:" for number in range(len(grid.headings))]
        lines = [grid.headings, alignment, *grid.rows]
        parts.append(f"## {grid.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def number(value: float) -> str:
    """Three figures or so."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def ratio(value: float, reference: float | None) -> str:
    """In parentheses, to stand behind the value; "" without anything to compare with."""
    if not reference:
        return ""
    found = value / reference
    return f" ({found:.2f} x)" if found < _MOST_RATIO else f" (> {_MOST_RATIO} x)"
