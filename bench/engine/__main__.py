"""Compares mmlane's modes in the real engine: python -m bench.engine [--quick]"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from bench.engine.cases import Kind, plan
from bench.engine.measuring import Measuring, order
from bench.engine.plots import draw
from bench.engine.records import Results, ratios
from bench.engine.tables import markdown, show
from bench.machine import facts, processor
from bench.ratios import put
from bench.releases import NEWEST
from devkit.demo import build_wheel
from devkit.server import ServerDied

OUT = Path(__file__).resolve().parent.parent / "out"
RELEASES = ("0.5.9", "0.5.12.post1", NEWEST)
MODES = ("off", "backport", "lane")
KINDS = get_args(Kind)
ROUNDS, QUICK_ROUNDS = 2, 1
_WIDTH = 140


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: servers are in sessions of their own
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)  # a narrow table is not readable
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "engine.json"
    complete = True
    if options.again:
        results = Results.load(path)
    else:
        began = time.monotonic()
        results = Results(_machine(options))
        complete = measure(options, results, path, console)
        console.print(f"measured in {time.monotonic() - began:.0f} s")
    show(results, console)
    (options.out / "engine.md").write_text(markdown(results, _about(results)))
    kept = [put("engine", ratios(results), options.out)] if options.quick and not options.again else []
    for written in (path, options.out / "engine.md", *draw(results, options.out), *kept):
        console.print(str(written))
    return 0 if complete else 1


def measure(options: argparse.Namespace, results: Results, path: Path, console: Console) -> bool:
    """Every release, round and mode; False where something kept from measuring all of it."""
    complete = True
    cases = [case for case in plan(quick=options.quick) if case.kind in options.only]
    try:
        with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as scratch:
            wheel = build_wheel(Path(scratch))
            for release in options.releases:
                for number, mode in order(
                    options.modes, options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
                ):
                    measuring = Measuring(
                        release,
                        mode,
                        number,
                        wheel=None if mode == "off" else wheel,
                        quick=options.quick,
                        caches=not options.no_caches,
                        results=results,
                        keep=lambda: results.save(path),
                        say=console.print,
                    )
                    try:
                        measuring.run(cases)
                    except ServerDied as error:
                        complete = False
                        console.print(f"{release}, {mode}: {error}")
    except KeyboardInterrupt:
        complete = False
        console.print("interrupted: what was measured so far counts")
    results.save(path)
    return complete


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **facts(),
        "processor": processor(),
        "load_before": os.getloadavg(),
        "quick": options.quick,
        "caches": not options.no_caches,
    }


def _about(results: Results) -> str:
    machine = results.machine
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_bytes'] >> 30} GiB, Linux"
        f" {machine['kernel']}, load {machine['load_before'][0]:.1f} before; mmlane {machine['commit']}"
        f"{', quick' if machine['quick'] else ''}{'' if machine['caches'] else ', engine without caches'}."
        " In parentheses: the ratio to `off`. What is measured, and how: `bench/engine/__init__.py`."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and requests, one round")
    parser.add_argument("--releases", nargs="+", default=RELEASES, metavar="VERSION", help=", ".join(RELEASES))
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help="off backport lane")
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS, help="kinds of requests (all)")
    parser.add_argument(
        "--rounds", type=int, help=f"servers for each release and mode ({ROUNDS}, quick {QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--no-caches", action="store_true", help="without the engine's caches: the model always runs"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="directory for the results (bench/out)")
    parser.add_argument("--again", action="store_true", help="tables and plots from the results that are there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
