"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from bench.harness import ratios
from bench.harness.tables import Grid, markdown, render

OUT = Path(__file__).resolve().parents[1] / "out"
SCRATCH = "mmlane-bench-"  # how the names of directories begin that a benchmark removes


def parser(benchmark: str, doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m bench.{benchmark}", description=(doc or "").partition("\n")[0].partition(": python")[0]
    )


def add_kept(options: argparse.ArgumentParser, *, quick: str | None) -> None:
    """The options of a benchmark that keeps its results. `quick`: what is less then."""
    if quick is not None:
        options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--out", type=Path, default=OUT, help="directory for the results (bench/out)")
    options.add_argument("--again", action="store_true", help="tables and plots from the results that are there")


def end_in_order() -> None:
    """SIGTERM is then like Ctrl-C: servers are in sessions of their own, and have to be ended by us."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def report(
    path: Path,
    out: Console,
    *,
    title: str,
    about: str,
    grids: Sequence[Grid],
    draw: Callable[[], Sequence[Path]] | None = None,
    kept: Mapping[str, ratios.Spread | None] | None = None,
) -> None:
    """Show the tables; write them, and plots, beside the results at `path`, and ratios that are to be kept."""
    render(grids, out)
    written = [path, path.with_suffix(".md")]
    written[1].write_text(markdown(title, about, grids))
    try:
        written += draw() if draw else []
    except ImportError:
        out.print("no plot: matplotlib is not installed (pip install -r bench/requirements.txt)")
    if kept is not None:
        written.append(ratios.put(path.stem, kept, path.parent))
    for one in written:
        out.print(str(one))
