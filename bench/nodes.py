"""One engine over two nodes: python -m bench.nodes

Images in a request, one request at a time, on the real engine (devkit) on this machine's CPU: two network
namespaces with a /dev/shm each, two ranks in each. `off` is the engine without the plugin, beside it the plugin in
its default mode, on both nodes; servers of both in turn.

blocked: in `TokenizerManager._send_one_request`, while the event loop does nothing else. received: in
`recv_requests`, of the rank for which it took longest; of text: the same for requests without images. held: the
storage that a rank keeps for a request's tensors, over their own bytes. crossed: what the second node's link
has received, over those bytes. Figures are medians over requests, of crossed the least; how the others are
noted is told in `bench.engine`. bare: what a transfer of as many bytes takes by `torch.distributed.send`
between two processes on such nodes, with nothing beside.

Without the plugin a request is as many times its bytes as it has images, several times over in each process: these
are as large as 24 GiB of memory allow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.engine.cases import Case
from bench.engine.measuring import ask, order, per_request, read_notes
from bench.engine.probe import sitecustomize as probe
from bench.machine import facts, processor
from devkit.client import IMAGE_SLOT, data_url
from devkit.demo import build_wheel
from devkit.images import jpeg
from devkit.nodes import LINK, Network, OnNodes
from devkit.server import dies_with_us, free_port

MODES = ("off", "lane")
RELEASES = ("0.5.12.post1", "0.5.23")
RANKS = 4
UNCOUNTED = 4  # requests to each server before those that count: the model is cold, and the lanes are closed


@dataclass(frozen=True)
class Images:
    """So many of that size in each request."""

    count: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.count} of {self.width}x{self.height}"


IMAGES = (Images(5, 952, 532), Images(32, 140, 112))


@dataclass
class Figures:
    """Of each request: seconds, and bytes over those of the payload."""

    blocked: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    of_text: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    crossed: list[float] = field(default_factory=list)
    payload: int = 0


def measure(release: str, images: Images, mode: str, wheel: Path, count: int, into: Figures) -> None:
    """One server, and as many requests to it."""
    pictures = [data_url(jpeg(images.width, images.height, seed)) for seed in range(images.count)]
    case = Case("image", images.count)
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as notes:
        env = {"PYTHONPATH": str(Path(probe.__file__).parent), probe.DIRECTORY: notes}
        plugin = None if mode == "off" else wheel
        with OnNodes(release, tp=RANKS, plugin=plugin, env=env) as server:
            answered, arrived = [], []
            for number in range(UNCOUNTED + count):
                before = server.network.received(1)
                answered += ask(server, [_body(pictures, number)], case)
                arrived.append(server.network.received(1) - before)
            text = ask(server, [_body([], number) for number in range(count)], case)
        written = read_notes(Path(notes))
    figures = per_request(written, answered[UNCOUNTED:], 1)
    received = [note for note in written if note["what"] == "recv"]
    into.payload = received[-1]["bytes"]
    into.blocked += figures["send_s"]
    into.received += map(max, *(figures[f"recv{rank}_s"] for rank in range(RANKS)))
    texts = per_request(written, text, 1)
    into.of_text += map(max, *(texts[f"text{rank}_s"] for rank in range(RANKS)))
    into.latency += [each.ended - each.began for each in answered[UNCOUNTED:]]
    into.held += [note["held"] / note["bytes"] for note in received[-RANKS * count :]]
    into.crossed += [nbytes / into.payload for nbytes in arrived[UNCOUNTED:]]


def _body(pictures: list[str], number: int) -> dict[str, Any]:
    return {
        "text": IMAGE_SLOT * len(pictures) + f"What is this? ({number})",
        **({"image_data": pictures} if pictures else {}),
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }


def bare(nbytes: int, times: int = 20) -> float:
    """Seconds, the median, that a send of so many bytes takes between two nodes."""
    with Network(2) as network:
        words = [sys.executable, "-m", "bench.nodes", "--send", str(nbytes), str(times)]
        address = f"tcp://{network.address(0)}:{free_port()}"
        ends = [
            subprocess.Popen(
                [*dies_with_us(), *network.inside(rank, [*words, address, str(rank)])],
                env={**os.environ, "GLOO_SOCKET_IFNAME": LINK},
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        said = [end.communicate()[0] for end in ends]
    times_taken: list[float] = json.loads(said[0])
    return statistics.median(times_taken)


def _send(nbytes: int, times: int, address: str, rank: int) -> None:
    """An end of `bare`, in a process of its own."""
    import time

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    data, done = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(1)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        if rank == 0:
            dist.send(data, 1)
            dist.recv(done, 1)
        else:
            dist.recv(data, 0)
            dist.send(done, 0)
        taken.append(time.perf_counter() - began)
    print(json.dumps(taken[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--requests", type=int, default=8, help="that count, on each server (8)")
    parser.add_argument("--rounds", type=int, default=2, help="servers for each case and mode (2)")
    parser.add_argument("--releases", nargs="+", default=RELEASES, metavar="VERSION", help=", ".join(RELEASES))
    parser.add_argument("--send", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        nbytes, times, address, rank = options.send
        _send(int(nbytes), int(times), address, int(rank))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table("release, images", "mode", *COLUMNS, box=None)
    console.print(f"{facts()['cores']} cores ({processor()}), mmlane {facts()['commit']}")
    try:
        with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as scratch:
            wheel = build_wheel(Path(scratch))
            for release in options.releases:
                for images in IMAGES:
                    found = {mode: Figures() for mode in MODES}
                    for _, mode in order(MODES, options.rounds):
                        measure(release, images, mode, wheel, options.requests, found[mode])
                    for mode, figures in found.items():
                        table.add_row(f"{release}, {images}", mode, *_cells(figures, found["off"], mode))
                    payload = found["lane"].payload
                    table.add_row("", f"bare, {payload >> 20} MiB", "", f"{bare(payload) * 1e3:.0f}")
    finally:  # a server that fails costs its own figures alone
        console.print(table)


WIDTH = 160  # where there is no terminal
COLUMNS = ("blocked, ms", "received, ms", "of text, ms", "latency, ms", "held / payload", "crossed / payload")


def _cells(figures: Figures, off: Figures, mode: str) -> list[str]:
    cells = []
    for name in ("blocked", "received", "of_text", "latency"):
        value = statistics.median(getattr(figures, name))
        ratio = value / statistics.median(getattr(off, name))
        cells.append(f"{value * 1e3:.1f}" + (f" ({ratio:.2f} x)" if mode != "off" else ""))
    return [*cells, f"{statistics.median(figures.held):.2f}", f"{min(figures.crossed):.2f}"]


if __name__ == "__main__":
    main()
