"""`python -m tools.ratios`: which ratios of the last `make bench QUICK=1` moved beyond their spread.

The line in bench/out is compared with the last of the same machine that bench/ratios.jsonl had before: in git at
the parent of this commit, or at this commit where there are uncommitted changes. A ratio has moved where its
spread and that of before have nothing in common; exit status 0, whatever moved. `--keep` adds the line to that
file, if it was measured at this commit without uncommitted changes; else the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.ratios import NAME, Spread

CHECKOUT = Path(__file__).resolve().parent.parent
KEPT = "bench/ratios.jsonl"


@dataclass(frozen=True)
class Line:
    """The ratios of one commit on one machine. `note`: what a person said of the run."""

    commit: str
    machine: str
    when: str
    ratios: Mapping[str, Spread]
    note: str = ""

    @classmethod
    def read(cls, text: str) -> Line:
        found: dict[str, Any] = json.loads(text)
        ratios = {name: Spread(*values) for name, values in found.pop("ratios").items()}
        return cls(ratios=ratios, **found)

    def __str__(self) -> str:
        return f"{self.commit}, {self.when}, {self.machine}{f' ({self.note})' if self.note else ''}"


def before(checkout: Path, machine: str) -> Line | None:
    """The line to compare with: the last of this machine, or else the last."""
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    text = _git(checkout, "show", f"{'HEAD' if changed else 'HEAD~'}:{KEPT}")
    lines = [Line.read(line) for line in (text or "").splitlines()]
    return next((line for line in reversed(lines) if line.machine == machine), lines[-1] if lines else None)


def why_not_kept(checkout: Path, commit: str) -> str:
    """What is wrong with a line of that commit (as `git describe --dirty` names it); "" where it is this one's."""
    if commit.endswith("-dirty"):
        return f"the line is of {commit}, so with uncommitted changes; commit them, run `make bench QUICK=1` again"
    this, named = (_git(checkout, "rev-parse", "--verify", f"{name}^{{commit}}") for name in ("HEAD", commit))
    if this is None or this != named:
        here = (this or "unknown").strip()
        return f"the line is of {commit}, and this commit is {here}; run `make bench QUICK=1` again"
    return ""


def _git(checkout: Path, *words: str) -> str | None:
    """What git says; None where it fails, such as for a file that a commit does not have."""
    done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def report(new: Line, old: Line) -> Iterator[str]:
    yield f"ratios of {new}"
    yield f"beside    {old}"
    if new.machine != old.machine:
        yield "! another machine: what moved may be its doing"
    moved = 0
    for name in sorted(new.ratios.keys() & old.ratios.keys()):
        was, now = old.ratios[name], new.ratios[name]
        if now.least > was.most or now.most < was.least:
            moved += 1
            yield f"moved {now.median / was.median - 1:+4.0%}  {name}: {_text(was)} -> {_text(now)}"
    for name in sorted(new.ratios.keys() - old.ratios.keys()):
        yield f"new          {name}: {_text(new.ratios[name])}"
    for name in sorted(old.ratios.keys() - new.ratios.keys()):
        yield f"not measured {name}: was {_text(old.ratios[name])}"
    yield f"{moved} of {len(new.ratios.keys() & old.ratios.keys())} moved beyond their spread"


def _text(ratio: Spread) -> str:
    return f"{ratio.median:.3g} ({ratio.least:.3g} - {ratio.most:.3g})"


def main(arguments: list[str] | None = None, checkout: Path = CHECKOUT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ratios", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help=f"add the line to {KEPT}")
    parser.add_argument("--note", default="", help="words to keep with it, such as what else the machine did")
    options = parser.parse_args(arguments)
    path = checkout / "bench" / "out" / NAME
    if not path.is_file():
        print(f"no {path}: run `make bench QUICK=1` first", file=sys.stderr)
        return 1
    found = {**json.loads(path.read_text()), "note": options.note}
    new = Line.read(json.dumps(found))
    old = before(checkout, new.machine)
    print(*(report(new, old) if old else [f"ratios of {new}", "git has none to compare with"]), sep="\n")
    if options.keep:
        if problem := why_not_kept(checkout, new.commit):
            print(f"not kept: {problem}", file=sys.stderr)
            return 1
        with (checkout / KEPT).open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
