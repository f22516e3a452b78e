"""Compares ways to hand a tensor from one process to several: python -m bench.transport [--quick]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.ratios import put
from bench.transport import records
from bench.transport.cases import (
    QUICK_READERS,
    QUICK_SIZES,
    READERS,
    SIZES,
    Case,
    parse_size,
    plan,
)
from bench.transport.group import Group, Setting
from bench.transport.measuring import Measuring
from bench.transport.peers import Peer, chosen
from bench.transport.plots import draw
from bench.transport.records import Record
from bench.transport.tables import markdown, show
from bench.transport.verdict import ratios

OUT = Path(__file__).resolve().parent.parent / "out"
ROUNDS, QUICK_ROUNDS = 7, 3
MESSAGES = 2000  # one way
_WIDTH = 140


def main() -> int:
    options = _options()
    console = Console()
    console.width = max(console.width, _WIDTH)  # a narrow table is not readable
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "transport.json"
    if options.again:
        found = records.load(results)
    else:
        began = time.monotonic()
        found = measure(options, console)
        records.save(found, results)
        console.print(f"measured in {time.monotonic() - began:.0f} s")
    show(found, console)
    (options.out / "transport.md").write_text(markdown(found, _about(found)))
    kept = [put("transport", ratios(found), options.out)] if options.quick and not options.again else []
    for path in (results, options.out / "transport.md", *draw(found, options.out), *kept):
        console.print(str(path), highlight=False)
    return 1 if any(record.status == "failed" for record in found) else 0


def measure(options: argparse.Namespace, console: Console) -> list[Record]:
    """Start every peer, go through the cases, end every peer."""
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    readers = options.readers or (QUICK_READERS if options.quick else READERS)
    cases: Sequence[Case] = plan(sizes, readers, quick=options.quick)
    peers: list[Peer] = options.only
    found: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as scratch:
        setting = Setting(max(readers), options.threads, Path(scratch))
        groups = [Group(peer, setting) for peer in peers]
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
        measuring = Measuring(groups, rounds=rounds, threads=options.threads, say=console.print)
        try:
            measuring.start()
            found += measuring.one_way(MESSAGES)
            for case in cases:
                found += measuring.cost(case)
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far counts")
        finally:
            for group in groups:
                group.stop()
    return found


def _about(found: Sequence[Record]) -> str:
    first = found[0]
    torch = ", ".join(sorted({r.torch for r in found if r.torch}))
    threads = f"{first.threads} thread{'s' * (first.threads > 1)}"
    return (
        f"Milliseconds, medians; {first.cores} cores, {threads} for copies and sums, torch {torch}."
        " What is measured, and how: `bench/transport/__init__.py`."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transport", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, a few rounds: minutes")
    parser.add_argument("--only", nargs="+", metavar="TRANSPORT", help="'lane', 'lane view', 'engine 0.5.9', ...")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="SIZE", help="payloads, such as 64K or 1G")
    parser.add_argument("--readers", nargs="+", type=int, metavar="R", help="numbers of reading processes")
    parser.add_argument("--rounds", type=int, help=f"rounds that count ({ROUNDS}, quick {QUICK_ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads for copies and sums (1)")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for the results (bench/out)")
    parser.add_argument("--again", action="store_true", help="tables and plots from the results that are there")
    options = parser.parse_args()
    try:
        options.only = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
