"""The producing process of one way, which also starts its readers. Run by team.py in the way's environment:

    PYTHON -m bench.transport.worker --orders FD --parent PID --module mmlane.bench.via_... [--mode MODE] ...

Takes orders from a pipe, answers each. A fault anywhere ends the process, and with it the readers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.harness.memory import Memory
from bench.harness.sizes import KIB
from mmlane.bench import producing
from mmlane.bench.case import Case
from mmlane.bench.clock import seconds, stamp
from mmlane.bench.payload import sums
from mmlane.bench.producing import Setup, fork_readers
from mmlane.bench.workers import die_with, obey

_UNCOUNTED = 100  # one-way messages before those that count


class Producing(producing.Producing):
    """One that looks at the memory as well, and measures latency. The public methods are the orders."""

    def one_way(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds from before the put until the first reader has the tensor, and for empty messages in between."""
        (pipe, *_) = self._pipes
        words = torch.empty(self._case.nbytes // 8, dtype=torch.int64).random_()
        pipe.send(("one way", count + _UNCOUNTED))
        pipe.recv()
        times, bare = [], []
        for number in range(count + _UNCOUNTED):
            tensor = words.clone()
            tensor[0] = number
            expected = sums([tensor])
            start = stamp()
            pipe.send_bytes(b"-")
            bare.append(seconds(pipe.recv() - start))
            start = stamp()
            pipe.send_bytes(self._producer.put([tensor])[0])
            arrived, found = pipe.recv()
            if found != expected:
                raise ValueError(f"message {number} arrived with other bytes than were sent")
            del tensor
            self._producer.free()
            times.append(seconds(arrived - start))
        return times[_UNCOUNTED:], bare[_UNCOUNTED:]

    def _in_use(self) -> int | None:
        return Memory.of(self._pids, forked=True).all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--orders", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--mode")
    parser.add_argument("--readers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    torch.set_num_threads(1)  # more would not survive the fork
    module = importlib.import_module(arguments.module)
    resource_tracker.ensure_running()  # one for all of them, as where processes are spawned
    gc.collect()
    gc.freeze()
    gc.disable()
    setup = Setup(arguments.readers, arguments.threads, arguments.scratch, arguments.mode)
    made = Producing(module.Producer(arguments.scratch, arguments.mode), fork_readers(module, setup))
    torch.set_num_threads(arguments.threads)
    # A small case first: memory that is written to in it is no longer shared when others are measured.
    made.begin(Case(arguments.readers, 64 * KIB))
    made.round(look=True, park=False)
    made.end()
    with Connection(arguments.orders) as orders:
        orders.send(("ok", torch.__version__))
        if obey(orders, made, until_fault=True):
            made.quit()


if __name__ == "__main__":
    main()
