"""Compares mmlane's modes in the real engine: python -m bench.engine [--quick]"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

from rich.console import Console

from bench.engine.cases import Kind, plan
from bench.engine.measuring import Measuring
from bench.engine.records import Results, ratios
from bench.engine.tables import grids
from bench.harness import command, machine, tables
from bench.harness.turns import turns
from bench.releases import NEWEST
from devkit.demo import build_wheel
from devkit.server import ServerDied

RELEASES = ("0.5.9", "0.5.12.post1", NEWEST)
MODES = ("off", "backport", "lane")
KINDS = get_args(Kind)
ROUNDS, QUICK_ROUNDS = 2, 1


def main() -> int:
    options = _options()
    command.end_in_order()
    console = tables.console()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "engine.json"
    complete = True
    if options.again:
        results = Results.load(path)
    else:
        began = time.monotonic()
        load = {"load_before": os.getloadavg()}
        results = Results({**machine.facts(), **load, "quick": options.quick, "caches": not options.no_caches})
        complete = measure(options, results, path, console)
        console.print(f"measured in {time.monotonic() - began:.0f} s")

    def draw() -> list[Path]:
        from bench.engine import plots

        return plots.draw(results, options.out)

    command.report(
        path,
        console,
        title="In the engine",
        about=_about(results),
        grids=list(grids(results)),
        draw=draw,
        kept=ratios(results) if options.quick and not options.again else None,
    )
    return 0 if complete else 1


def measure(options: argparse.Namespace, results: Results, path: Path, console: Console) -> bool:
    """Every release, round and mode; False where something kept from measuring all of it."""
    complete = True
    cases = [case for case in plan(quick=options.quick) if case.kind in options.only]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    try:
        with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
            wheel = build_wheel(Path(scratch))
            for release in options.releases:
                for _, mode in turns(options.modes, rounds):
                    try:
                        Measuring(release, mode, wheel, results, path, console.print).run(cases)
                    except ServerDied as error:
                        complete = False
                        console.print(f"{release}, {mode}: {error}")
    except KeyboardInterrupt:
        complete = False
        console.print("interrupted: what was measured so far counts")
    results.save(path)
    return complete


def _about(results: Results) -> str:
    known = results.machine
    return (
        f"{known['cores']} cores ({known['processor']}), {known['memory_bytes'] >> 30} GiB, Linux"
        f" {known['kernel']}, load {known['load_before'][0]:.1f} before; mmlane {known['commit']}"
        f"{', quick' if known['quick'] else ''}{'' if known['caches'] else ', engine without caches'}."
        " In parentheses: the ratio to `off`. What is measured, and how: `bench/engine/__init__.py`."
    )


def _options() -> argparse.Namespace:
    parser = command.parser("engine", __doc__)
    command.add_kept(parser, quick="fewer cases and requests, one round")
    parser.add_argument("--releases", nargs="+", default=RELEASES, metavar="VERSION", help=", ".join(RELEASES))
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help=" ".join(MODES))
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS, help="kinds of requests (all)")
    parser.add_argument(
        "--rounds", type=int, help=f"servers for each release and mode ({ROUNDS}, quick {QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--no-caches", action="store_true", help="without the engine's caches: the model always runs"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
