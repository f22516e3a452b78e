"""`python -m tools.compat_table`: compat_matrix.yaml as Markdown, in README.md and docs/compatibility.md.

`--check` writes nothing, and exits with 1 when a file does not say what the table says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

from packaging.version import Version

from mmlane.compat import Matrix, matrix
from mmlane.patching import Cell, PatchSpec

ROOT = Path(__file__).parent.parent
START = "<!-- compat-table:start -->"
END = "<!-- compat-table:end -->"
PULL = "https://github.com/sgl-project/sglang/pull/"


def overview(table: Matrix) -> str:
    """Engine releases down, patches across; one row for releases that have the same cells."""
    specs = _specs(table)
    rows = [["SGLang", *(f"`{spec.id}`" for spec in specs)]]
    for states, versions_of_row in groupby(
        table.engines, key=lambda version: [_cell(spec, version).state for spec in specs]
    ):
        versions = list(versions_of_row)
        rows.append([_span(versions[0], versions[-1]), *("applied" if s == "apply" else "native" for s in states)])
    note = (
        "*applied*: mmlane makes the change; *native*: the engine has it. "
        f"Releases newer than {table.newest}, development versions and forks are treated like the release before "
        "them, if the functions to be changed are as expected, and reported as untested."
    )
    return f"{_markdown(rows)}\n\n{note}"


def details(table: Matrix) -> str:
    """The overview, then every patch: why, what follows without it, and each of its cells."""
    parts = [overview(table)]
    for spec in _specs(table):
        rows = [["SGLang", "mmlane"]]
        for cell, versions_of_row in groupby(table.engines, key=lambda version: _cell(spec, version)):
            versions = list(versions_of_row)
            does = "fixes" if cell.state == "apply" else "native"
            rows.append([_span(versions[0], versions[-1]), f"{does}: {cell.reason}"])
        upstream = ", ".join(f"[{ref}]({PULL}{ref.removeprefix('#')})" for ref in spec.upstream) or "none"
        parts.append(
            f"### `{spec.id}`\n\n{spec.why}\n\nWithout it: {spec.consequence}.\n\n{_markdown(rows)}\n\n"
            f"Upstream: {upstream}. It can be dropped when {spec.drop_when}."
        )
    return "\n\n".join(parts)


FILES: Mapping[str, Callable[[Matrix], str]] = {"README.md": overview, "docs/compatibility.md": details}


class NoMarkers(Exception):
    """A file lacks the place where the table goes."""


def filled(text: str, name: str, content: str) -> str:
    """The text of a file with the table in its place."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise NoMarkers(f"{name}: wanted one {START} and one {END} after it, each on a line of its own")
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{content}\n{END}{after}"


def stale(root: Path, table: Matrix) -> dict[Path, str]:
    """The files that do not say what the table says, with the text that they should have."""
    found = {}
    for name, render in FILES.items():
        file = root / name
        if not file.is_file():
            raise NoMarkers(f"{name}: no such file; write it with {START} and {END} in it")
        text = file.read_text(encoding="utf-8")
        right = filled(text, name, render(table))
        if text != right:
            found[file] = right
    return found


def _specs(table: Matrix) -> list[PatchSpec]:
    return [table.spec(id, targets=()) for id in table.rows]


def _cell(spec: PatchSpec, version: Version) -> Cell:
    cell = spec.cell(version)
    if cell is None:
        raise ValueError(f"{spec.id} has no cell for {version}: its first one must start at the oldest engine")
    return cell


def _span(first: Version, last: Version) -> str:
    return str(first) if first == last else f"{first} – {last}"  # noqa: RUF001 - a range of versions


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compat_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is stale")
    options = parser.parse_args(arguments)
    try:
        found = stale(ROOT, matrix())
    except NoMarkers as problem:
        print(problem, file=sys.stderr)
        return 1
    for file, right in found.items():
        if options.check:
            print(f"{file.relative_to(ROOT)} is stale: run `python -m tools.compat_table`", file=sys.stderr)
        else:
            file.write_text(right, encoding="utf-8")
            print(f"wrote the table in {file.relative_to(ROOT)}")
    return 1 if found and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
