"""Measures the way from a producer's CPU to a consumer's GPU: python -m bench.gpu [--quick]"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.device import Device, Watcher, lacking
from bench.gpu.measures import MEASURES, Plan
from bench.gpu.records import REHEARSAL, Results, absent, ratios
from bench.gpu.report import about, draw, grids
from bench.gpu.workers import Worker, hurry
from bench.ratios import put
from bench.transport.group import Failed
from bench.transport.tables import render, write

OUT = Path(__file__).resolve().parent.parent / "out"
_WIDTH = 160


def main() -> int:
    options = _options()
    console = Console(highlight=False, soft_wrap=True)
    if not (options.rehearse or options.again) and (reason := lacking(options.devices)):
        console.print(f"skipped: {reason}", markup=False)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "gpu-rehearsal" if options.rehearse else "gpu"
    path = options.out / f"{stem}.json"
    results = Results.load(path) if options.again else measure(options, path, console)
    wide = Console(highlight=False, width=max(console.width, _WIDTH))  # a narrow table is not readable
    console.print(about(results), markup=False)
    render(grids(results), wide)
    written = [path, options.out / f"{stem}.md"]
    written[1].write_text(write("To the GPU", about(results), grids(results)))
    try:
        written += draw(results, options.out / f"{stem}.png")
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install -r bench/requirements.txt)")
    if options.quick and not (options.again or options.rehearse):
        written.append(put("gpu", ratios(results), options.out))
    for one in written:
        console.print(str(one))
    return 1 if any(record.status == "failed" for record in results.records) else 0


def measure(options: argparse.Namespace, path: Path, console: Console) -> Results:
    """All that is asked for; saved after each measure."""
    indices = options.devices or range(torch.cuda.device_count())
    plan = Plan([Device(index) for index in indices])
    if options.rehearse:
        plan = plan.rehearsal()
    elif options.quick:
        plan = plan.quick()
    results = Results(REHEARSAL if options.rehearse else "")
    if options.rehearse:
        hurry()
    try:
        watcher = Worker(Watcher, plan.devices)
        try:
            watcher.answer()
            results.machine = watcher.call("facts") | {"quick": options.quick}
        finally:
            watcher.end()
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
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: minutes")
    parser.add_argument("--devices", type=_indices, metavar="I,J", help="GPUs, the producer's first (all)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small: not a measurement")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for the results (bench/out)")
    parser.add_argument("--again", action="store_true", help="tables and plot from the results that are there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
