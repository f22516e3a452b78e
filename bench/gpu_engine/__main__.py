"""Asks the engine with its ranks on a GPU, with mmlane and without: python -m bench.gpu_engine"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engine.asking import Unanswered
from bench.gpu_engine.records import SECONDS, Results, about, table
from bench.gpu_engine.requests import CASES, Images, rounds
from bench.gpu_engine.server import Server
from bench.harness import command, tables
from bench.harness.machine import CHECKOUT
from bench.harness.results import Record
from devkit.server import ServerDied
from mmlane.cli.status import look

MODES = ("off", "lane")
ROUNDS = 6
_UNCOUNTED = 2
_WRITER = CHECKOUT / "devkit" / "checkpoint_writer.py"
_SETTLED_S = 15.0
_LOOK_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    console = tables.console()
    if not options.again and (reason := lacking()):
        console.print(f"skipped: {reason}")
        return 0
    command.end_in_order()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu-engine.json"
    complete = True
    if options.again:
        results = Results.load(path)
    else:
        results = Results(machine())
        complete = measure(options, results, path, console)
    console.print(about(results))
    command.report(path, console, title="The engine on a GPU", about=about(results), grids=[table(results)])
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
    from bench.harness.spawned import spawned

    with spawned(Watcher, [Device(0)]) as watcher:  # its context on the GPU ends with it
        found = watcher.call("facts")
    gpu = found["gpus"][0]
    driver = gpu.get("driver_version", "unknown")
    return {**found, "gpu": gpu["name"], "driver": driver, "sglang": version("sglang")}


def measure(options: argparse.Namespace, results: Results, path: Path, console: Console) -> bool:
    """Every mode; False where something kept from measuring all of it. Saved after each kind of request."""
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as directory:
        scratch = Path(directory)
        model = options.model or _tiny(scratch)
        for mode in options.modes:
            server = Server(model, mode, scratch)
            try:
                with server:
                    images = Images()  # the same for each mode
                    for case in CASES:
                        found = list(rounds(server.client, case, images, _UNCOUNTED + ROUNDS))
                        seconds, texts = zip(*found[_UNCOUNTED:], strict=True)
                        results.records.append(Record("", str(case), mode, figures={SECONDS: list(seconds)}))
                        results.texts.setdefault(mode, {})[str(case)] = list(texts)
                        results.save(path)
                        console.print(f"{mode}: {case}: done")
                    results.lanes[mode] = settled(server)
            except (ServerDied, Unanswered) as problem:
                console.print(f"{mode}: {problem} (log: {server.log_path})")
                return False
            results.left[mode] = sorted(server.shm_listing())
            server.close()
            results.save(path)
    return True


def settled(server: Server) -> list[dict[str, Any]]:
    """The status of the server's lane when no ticket is out, or after a while; [] without a lane."""
    deadline = time.monotonic() + _SETTLED_S
    while True:
        lanes = [lane for lane in look() if lane.pid in {process.pid for process in server.processes()}]
        if not any(lane.stats and lane.stats.tickets for lane in lanes) or time.monotonic() > deadline:
            return [lane.as_dict() for lane in lanes]
        time.sleep(_LOOK_S)


def _tiny(scratch: Path) -> Path:
    """The devkit's checkpoint, written by this Python."""
    model = scratch / "model"
    model.mkdir()
    subprocess.run([sys.executable, _WRITER, model, "qwen2_vl"], check=True)
    return model


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("gpu_engine", __doc__)
    command.add_kept(parser, quick=None)
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help="off backport lane (off lane)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (the devkit's tiny Qwen2-VL)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
