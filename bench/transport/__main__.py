"""Compares ways to hand a tensor from one process to several: python -m bench.transport [--quick]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bench.harness import command, machine, tables
from bench.harness.sizes import parse_size
from bench.transport.cases import QUICK_READERS, QUICK_SIZES, READERS, SIZES, plan
from bench.transport.goals import ratios
from bench.transport.measuring import Measuring
from bench.transport.records import Results
from bench.transport.tables import grids
from bench.transport.team import Setting, Team
from bench.transport.ways import chosen

ROUNDS, QUICK_ROUNDS = 7, 3
MESSAGES = 2000  # one way


def main() -> int:
    options = _options()
    console = tables.console()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "transport.json"
    if options.again:
        results = Results.load(path)
    else:
        began = time.monotonic()
        results = measure(options, console)
        results.save(path)
        console.print(f"measured in {time.monotonic() - began:.0f} s")

    def draw() -> list[Path]:
        from bench.transport import plots

        return plots.draw(results, options.out)

    command.report(
        path,
        console,
        title="Transports",
        about=_about(results),
        grids=list(grids(results)),
        draw=draw,
        kept=ratios(results) if options.quick and not options.again else None,
    )
    return 1 if any(record.status == "failed" for record in results.records) else 0


def measure(options: argparse.Namespace, console: Console) -> Results:
    """Start every way's processes, go through the cases, end them."""
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    readers = options.readers or (QUICK_READERS if options.quick else READERS)
    results = Results({**machine.facts(), "quick": options.quick, "threads": options.threads})
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
        setting = Setting(max(readers), options.threads, Path(scratch))
        teams = [Team(way, setting) for way in options.only]
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
        measuring = Measuring(teams, rounds=rounds, say=console.print)
        try:
            measuring.start()
            results.records += measuring.one_way(MESSAGES)
            for case in plan(sizes, readers, quick=options.quick):
                results.records += measuring.cost(case)
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far counts")
        finally:
            for team in teams:
                team.end()
    results.machine["torch"] = sorted({team.torch for team in teams if team.torch})
    return results


def _about(results: Results) -> str:
    known = results.machine
    threads = f"{known['threads']} thread{'s' * (known['threads'] > 1)}"
    return (
        f"Milliseconds, medians; {known['cores']} cores, {threads} for copies and sums,"
        f" torch {', '.join(known['torch'])}. What is measured, and how: `bench/transport/__init__.py`."
    )


def _options() -> argparse.Namespace:
    parser = command.parser("transport", __doc__)
    command.add_kept(parser, quick="a few cases, a few rounds: minutes")
    parser.add_argument("--only", nargs="+", metavar="TRANSPORT", help="'lane', 'lane view', 'engine 0.5.9', ...")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="SIZE", help="payloads, such as 64K or 1G")
    parser.add_argument("--readers", nargs="+", type=int, metavar="R", help="numbers of reading processes")
    parser.add_argument("--rounds", type=int, help=f"rounds that count ({ROUNDS}, quick {QUICK_ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads for copies and sums (1)")
    options = parser.parse_args()
    try:
        options.only = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
