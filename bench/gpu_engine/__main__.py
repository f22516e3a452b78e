"""Asks the engine with its ranks on a GPU, with mmlane and without: python -m bench.gpu_engine"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu_engine.records import Record, Results, about, table
from bench.gpu_engine.requests import CASES, Images, Unanswered, rounds
from bench.gpu_engine.server import Server
from bench.transport.tables import render, write
from devkit.server import ServerDied
from mmlane.cli.status import look

OUT = Path(__file__).resolve().parent.parent / "out"
MODES = ("off", "lane")
ROUNDS = 6
_UNCOUNTED = 2
_WRITER = Path(__file__).resolve().parents[2] / "devkit" / "checkpoint_writer.py"
_SHM = Path("/dev/shm")
_SETTLED_S = 15.0
_LOOK_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    console = Console(highlight=False, soft_wrap=True)
    if not options.again and (reason := lacking()):
        console.print(f"skipped: {reason}", markup=False)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: servers are in sessions of their own
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu-engine.json"
    complete = True
    if options.again:
        results = Results.load(path)
    else:
        results = Results(machine())
        complete = measure(options, results, path, console)
    console.print(about(results), markup=False)
    render([table(results)], console)
    report = options.out / "gpu-engine.md"
    report.write_text(write("The engine on a GPU", about(results), [table(results)]))
    console.print(f"{path}\n{report}")
    return 0 if complete else 1


def lacking() -> str | None:
    """One line on what is missing here; None where nothing is."""
    for package, what in (("torch", "for CUDA"), ("sglang", "0.5.16"), ("sglang-mmlane", "this plugin")):
        try:
            version(package)
        except PackageNotFoundError:
            return f"no {package} in this environment ({sys.executable}); wanted: {package}, {what}"
    from bench.gpu.device import lacking as no_gpu

    return no_gpu(None)


def machine() -> dict[str, Any]:
    """The GPU, the machine and what is installed."""
    from bench.gpu.device import Device, Watcher
    from bench.gpu.workers import Worker

    watcher = Worker(Watcher, [Device(0)])  # its context on the GPU ends with it
    try:
        watcher.answer()
        found = watcher.call("facts")
    finally:
        watcher.end()
    gpu = found["gpus"][0]
    driver = gpu.get("driver_version", "unknown")
    return {**found, "gpu": gpu["name"], "driver": driver, "sglang": version("sglang")}


def measure(options: argparse.Namespace, results: Results, path: Path, console: Console) -> bool:
    """Every mode; False where something kept from measuring all of it. Saved after each kind of request."""
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as directory:
        scratch = Path(directory)
        model = options.model or _tiny(scratch)
        for mode in options.modes:
            before = _names()
            log = options.out / f"gpu-engine-{mode}.log"
            try:
                with Server(model, mode, scratch, log) as server:
                    images = Images()  # the same for each mode
                    for case in CASES:
                        found = list(rounds(server.client, case, images, _UNCOUNTED + ROUNDS))
                        seconds, texts = zip(*found[_UNCOUNTED:], strict=True)
                        results.records.append(Record(mode, str(case), list(seconds), list(texts)))
                        results.save(path)
                        console.print(f"{mode}: {case}: done", markup=False)
                    results.lanes[mode] = settled(server)
            except (ServerDied, Unanswered) as problem:
                console.print(f"{mode}: {problem} (log: {log})", markup=False)
                return False
            results.left[mode] = sorted(_names() - before)
            results.save(path)
    return True


def settled(server: Server) -> list[dict[str, Any]]:
    """What the server's lane says of itself when no ticket is out, or after a while; [] without a lane."""
    deadline = time.monotonic() + _SETTLED_S
    while True:
        lanes = [lane for lane in look() if lane.pid in server.pids()]
        if not any(lane.stats and lane.stats.tickets for lane in lanes) or time.monotonic() > deadline:
            return [lane.as_dict() for lane in lanes]
        time.sleep(_LOOK_S)


def _tiny(scratch: Path) -> Path:
    """The devkit's checkpoint, written by this Python."""
    model = scratch / "model"
    model.mkdir()
    subprocess.run([sys.executable, _WRITER, model, "qwen2_vl"], check=True)
    return model


def _names() -> set[str]:
    return {entry.name for entry in _SHM.iterdir()}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_engine", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help="off backport lane (off lane)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (the devkit's tiny Qwen2-VL)")
    parser.add_argument("--out", type=Path, default=OUT, help="directory for results and logs (bench/out)")
    parser.add_argument("--again", action="store_true", help="the table from the results that are there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
