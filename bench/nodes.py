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

Without the plugin a request is as many times its bytes as it has images, several times over in each process: those
that are compared are as large as 24 GiB of memory allow, and larger ones are measured with the plugin alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine.asking import ask, per_request, probed, read_notes, slowest
from bench.engine.cases import Case, body, question
from bench.engine.modes import BLOCKED, HELD, LATENCY, MODES, RECEIVED, compare, of_requests, parser, rows
from bench.engine.records import Measure
from bench.harness import command, machine, tables
from bench.harness.nodes import run_on_each
from bench.harness.results import Results
from bench.harness.tables import Grid
from bench.releases import NEWEST
from devkit.client import data_url
from devkit.demo import build_wheel
from devkit.images import jpeg
from devkit.nodes import Network, OnNodes

RELEASES = ("0.5.12.post1", NEWEST)
RANKS = 4
UNCOUNTED = 4  # requests to each server before those that count: the model is cold, and the lanes are closed
MEASURES = (BLOCKED, RECEIVED, Measure("of_text", "of text", "ms", 1e3), LATENCY, HELD)
CROSSED = "crossed / payload"


@dataclass(frozen=True)
class Images:
    """So many of that size in each request, to an engine of that release."""

    release: str
    count: int
    width: int
    height: int
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.release}, {self.count} of {self.width}x{self.height}"


IMAGES: tuple[tuple[Any, ...], ...] = ((5, 952, 532), (32, 140, 112), (32, 320, 240, MODES[1:]))


def measure(images: Images, plugin: Path | None, count: int) -> dict[str, list[float]]:
    """One server, and so many requests to it that count."""
    pictures = [data_url(jpeg(images.width, images.height, seed)) for seed in range(images.count)]
    case = Case("image", images.count)
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
        notes = Path(scratch)
        with OnNodes(images.release, tp=RANKS, plugin=plugin, env=probed(notes)) as server:
            answered, arrived = [], []
            for number in range(UNCOUNTED + count):
                before = server.network.received(1)
                answered += ask(server, [body(question(images.count, number), pictures, ignore_eos=True)], case)
                arrived.append(server.network.received(1) - before)
            text = ask(server, [body(question(0, number), [], ignore_eos=True) for number in range(count)], case)
        figures = of_requests(notes, answered[UNCOUNTED:], RANKS)
        figures["of_text"] = slowest(per_request(read_notes(notes), text, 1), "text", RANKS)
    figures["crossed"] = [nbytes / figures["bytes"][-1] for nbytes in arrived[UNCOUNTED:]]
    return figures


def bare(nbytes: int, times: int = 20) -> float:
    """Seconds, the median, that a send of so many bytes takes between two nodes."""
    with Network(2) as network:
        taken: list[float] = run_on_each(network, "bench.nodes", nbytes, times)
        return statistics.median(taken)


def end_of_bare(rank: int, nbytes: int, times: int, address: str) -> None:
    """One node."""
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
    words = parser("nodes", __doc__)
    words.add_argument("--releases", nargs="+", default=RELEASES, metavar="VERSION", help=", ".join(RELEASES))
    words.add_argument("--end", nargs=4, help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.end:
        rank, nbytes, times, address = options.end
        end_of_bare(int(rank), int(nbytes), int(times), address)
        return
    console = tables.console()
    console.print(machine.in_short())
    results: Results[Images] = Results()
    found: list[list[str]] = []
    try:
        with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
            wheel = build_wheel(Path(scratch))
            for images in (Images(release, *of) for release in options.releases for of in IMAGES):
                compare(results, images, wheel, options, measure, images.modes)
                for row in rows(results, images, MEASURES, images.modes):
                    found.append([*row, f"{min(results.values('', images, row[1], 'crossed')):.2f}"])
                payload = int(results.values("", images, "lane", "bytes")[-1])
                sent = f"{bare(payload) * 1e3:.1f}"
                found.append(["", f"bare, {payload >> 20} MiB", "", sent, *[""] * (len(MEASURES) - 1)])
    finally:  # a server that fails costs its own figures alone
        headings = ["release, images", "mode", *map(str, MEASURES), CROSSED]
        tables.render([Grid("Two nodes", headings, found, 2)], console)


if __name__ == "__main__":
    main()
