"""What a put takes where another thread of its process runs Python: python -m bench.busy_threads

A tokenizer prepares images in threads while its event loop sends others. A thread that gives up the interpreter's
lock (the GIL), as most calls of torch do, may wait up to 5 ms to get it back, each time. Beside the lane's put is
a plain copy by torch (`Tensor.copy_`) into memory that is there already. Torch copies by one thread, as in a
tokenizer's worker from 0.5.16 on. Both ways and both states take turns; figures are medians.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from bench.harness import command, tables
from bench.harness.sizes import KIB, MIB, size
from bench.harness.tables import Grid
from mmlane.lane import Invitation, Lane, Reader, Refused

SIZES = (64 * KIB, 1 * MIB, 8 * MIB, 32 * MIB, 64 * MIB)
WAYS = ("put", "copy_")


def read(invitation: Invitation, pipe: Connection) -> None:
    """A reader in a process of its own: it takes each ticket, and lets go of it."""
    with Reader("tp", 0) as reader:
        reader.join(invitation)
        while (ticket := pipe.recv()) is not None:
            reader.take(ticket, "view")
            pipe.send("done")


class Busy:
    """A thread that runs Python while `on` is set."""

    def __init__(self) -> None:
        self.on = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over:
            self.on.wait()
            while self.on.is_set() and not self._is_over:
                sum(number for number in range(1000))

    def end(self) -> None:
        self._is_over = True
        self.on.set()
        self._thread.join()


def measure(lane: Lane, pipe: Connection, nbytes: int, rounds: int) -> dict[tuple[str, bool], float]:
    """Seconds, the median, by way and by whether another thread is busy."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    tickets: list[bytes] = []

    def put() -> None:
        ticket = lane.put(source)
        assert not isinstance(ticket, Refused), ticket
        tickets.append(ticket)

    ways: dict[str, Callable[[], object]] = {"put": put, "copy_": lambda: target.copy_(source)}
    taken: dict[tuple[str, bool], list[float]] = {(way, is_busy): [] for way in WAYS for is_busy in (False, True)}
    busy = Busy()
    try:
        for number in range(rounds + 1):
            for (way, is_busy), times in taken.items():
                (busy.on.set if is_busy else busy.on.clear)()
                began = time.perf_counter()
                ways[way]()
                if number:  # the first one finds no memory
                    times.append(time.perf_counter() - began)
                for ticket in tickets:
                    pipe.send(ticket)
                    pipe.recv()
                tickets.clear()
    finally:
        busy.end()
    return {key: statistics.median(times) for key, times in taken.items()}


def main() -> None:
    parser = command.parser("busy_threads", __doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of each way and state (30)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = multiprocessing.Pipe()
    rows = []
    with Lane({"tp": 1}, capacity=1 << 30, idle=3600) as lane:
        reader = multiprocessing.get_context("spawn").Process(target=read, args=(lane.invitation, theirs))
        reader.start()
        assert lane.wait_open(60)
        for nbytes in SIZES:
            found = measure(lane, ours, nbytes, options.rounds)
            cells = [f"{found[way, is_busy] * 1e3:.3f}" for way in WAYS for is_busy in (False, True)]
            rows.append([size(nbytes), *cells, f"{found['put', True] / found['copy_', True]:.2f}"])
        ours.send(None)
        reader.join()
    headings = ["", *(f"{way}, {state}" for way in WAYS for state in ("ms", "busy, ms")), "busy, put over copy_"]
    tables.render([Grid("Beside a thread that runs Python", headings, rows)], tables.console())


if __name__ == "__main__":
    main()
