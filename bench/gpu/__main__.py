"""Measures the way from a producer's CPU to a consumer's GPU: python -m bench.gpu [--quick]"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.device import Device, Watcher, lacking
from bench.gpu.measures import MEASURES, Plan
from bench.gpu.records import REHEARSAL, Results, ratios
from bench.gpu.report import about, draw, grids
from bench.harness import command, tables
from bench.harness.results import absent
from bench.harness.spawned import hurry, spawned
from mmlane.bench.workers import Failed


def main() -> int:
    options = _options()
    console = tables.console()
    if not (options.rehearse or options.again) and (reason := lacking(options.devices)):
        console.print(f"skipped: {reason}")
        return 0
    command.end_in_order()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("gpu-rehearsal.json" if options.rehearse else "gpu.json")
    results = Results.load(path) if options.again else measure(options, path, console)
    console.print(about(results))
    measured = options.quick and not (options.again or options.rehearse)
    command.report(
        path,
        console,
        title="To the GPU",
        about=about(results),
        grids=list(grids(results)),
        draw=lambda: draw(results, path.with_suffix(".png")),
        kept=ratios(results) if measured else None,
    )
    return 1 if any(record.status == "failed" for record in results.records) else 0


def measure(options: argparse.Namespace, path: Path, console: Console) -> Results:
    """All that is asked for; saved after each measure."""
    indices = options.devices or range(torch.cuda.device_count())
    plan = Plan([Device(index) for index in indices])
    if options.rehearse:
        plan = plan.rehearsal()
    elif options.quick:
        plan = plan.quick()
    results = Results(note=REHEARSAL if options.rehearse else "")
    if options.rehearse:
        hurry("bench.gpu.device", "bench.gpu.team", "bench.gpu.measures")
    try:
        with spawned(Watcher, plan.devices) as watcher:
            results.machine = watcher.call("facts") | {"quick": options.quick}
        for name in options.only or MEASURES:
            began = time.monotonic()
            try:
                results.records += MEASURES[name](plan)
            except Failed as problem:  # of what all its ways need
                results.records.append(absent(name, "all", "all", problem))
            results.save(path)
            console.print(f"{name}: {time.monotonic() - began:.0f} s{', ' * bool(results.note)}{results.note}")
    except KeyboardInterrupt:
        if not results.records:
            raise
        console.print("interrupted: the measures that were finished count")
    return results


def _indices(text: str) -> Sequence[int]:
    return list(dict.fromkeys(int(index) for index in text.split(",")))


def _options() -> argparse.Namespace:
    parser = command.parser("gpu", __doc__)
    command.add_kept(parser, quick="fewer sizes and rounds: minutes")
    parser.add_argument("--devices", type=_indices, metavar="I,J", help="GPUs, the producer's first (all)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small: not a measurement")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
