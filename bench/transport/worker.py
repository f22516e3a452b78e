"""The producing process of one way, which also starts its readers. Run by team.py in the way's environment:

    PYTHON -m bench.transport.worker --orders FD --parent PID --module bench.transport.via_... [--mode MODE] ...

Takes orders from a pipe, answers each. A fault anywhere ends the process, and with it the readers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bench.harness.clock import seconds, stamp
from bench.harness.memory import Memory, tidy
from bench.harness.sizes import KIB
from bench.harness.workers import die_with, obey
from bench.transport.cases import Case
from bench.transport.contract import Producer
from bench.transport.payload import Payload, sample, sums
from bench.transport.reading import Reading, serve
from bench.transport.records import Round

_UNCOUNTED = 100  # one-way messages before those that count


class Producing:
    """A producer and its readers, of which a case uses as many as it needs. The public methods are the orders."""

    def __init__(self, producer: Producer, readers: Sequence[tuple[Connection, BaseProcess]]) -> None:
        self._producer = producer
        self._readers = readers
        self._pids = [os.getpid(), *(process.pid for _, process in readers if process.pid)]
        self._case = Case(len(readers), 64 * KIB)
        self._pipes: Sequence[Connection] = ()  # of the readers in this case
        self._payload: Payload | None = None
        self._memory_before = 0

    def begin(self, case: Case) -> None:
        self._case = case
        self._pipes = [pipe for pipe, _ in self._readers[: case.readers]]
        self._payload = Payload(case.nbytes, case.items)
        self._memory_before = self._in_use()
        address = self._producer.open(case)
        for rank, pipe in enumerate(self._pipes):
            pipe.send(("open", address, rank, case))
        self._gather()
        self._producer.ready()

    def end(self) -> None:
        self._tell(("close",))
        self._gather()
        self._producer.close()
        self._payload = None
        tidy()

    def round(self, look: bool, park: bool) -> Round:
        """One message. `look`: compare pages, and look at the memory. `park`: keep no payload until the next."""
        payload = self._payload or Payload(self._case.nbytes, self._case.items)
        self._payload = None if park else payload
        tensors = payload.refresh()
        expected = sums(tensors)
        memcpy = payload.copy(tensors)
        sums(tensors)  # so that the put finds the caches as the copy did
        expected_sample = sample(tensors) if look else None

        n = self._case.n
        self._tell(("round", n, look))
        self._gather()
        put = 0
        start = stamp()
        for _ in range(n):
            before = stamp()
            messages = self._producer.put(tensors)
            put += stamp() - before
            for pipe, message in zip(self._pipes, messages, strict=True):
                pipe.send_bytes(message)
        self._gather()
        self._tell("sum again")
        self._gather()
        held = self._in_use() - self._memory_before if look else None
        self._tell("free")
        readings: list[Reading] = self._gather()
        before = stamp()
        del tensors
        self._producer.free()
        free = stamp() - before

        for reading in readings:
            _verify(reading, n, expected, expected_sample)
        slowest_free = max(reading.free for reading in readings)
        return Round(
            cost_s=seconds(max(r.read_at - start - r.warm for r in readings) + slowest_free + free),
            memcpy_s=memcpy,
            put_s=seconds(put),
            take_s=seconds(max(r.take for r in readings)),
            first_read_extra_s=seconds(max(r.first - r.warm for r in readings)),
            free_reader_s=seconds(slowest_free),
            free_producer_s=seconds(free),
            memory_bytes=held,
        )

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

    def quit(self) -> None:
        """Have the readers end."""
        for pipe, process in self._readers:
            pipe.send(("quit",))
            process.join()

    def _in_use(self) -> int:
        return Memory.of(self._pids, forked=True).all

    def _tell(self, order: object) -> None:
        for pipe in self._pipes:
            pipe.send(order)

    def _gather(self) -> list[Any]:
        return [pipe.recv() for pipe in self._pipes]


def _verify(reading: Reading, n: int, expected: Sequence[int], expected_sample: int | None) -> None:
    if [list(found) for found in reading.sums] != [list(expected)] * n:
        raise ValueError("a reader's tensors have other sums than the source")
    if expected_sample is not None and list(reading.samples) != [expected_sample] * n:
        raise ValueError("a reader's tensors have other pages than the source")


def fork_readers(module: Any, arguments: argparse.Namespace) -> list[tuple[Connection, BaseProcess]]:
    """The readers, idle, with our ends of their pipes. They have what the module imported, without its cost."""
    fork = multiprocessing.get_context("fork")
    readers: list[tuple[Connection, BaseProcess]] = []
    for _ in range(arguments.readers):
        ours, theirs = fork.Pipe()
        inherited = [ours, *(pipe for pipe, _ in readers)]
        process = fork.Process(target=read, args=(module, arguments, os.getpid(), theirs, inherited), daemon=True)
        process.start()
        theirs.close()
        readers.append((ours, process))
    return readers


def read(
    module: Any, arguments: argparse.Namespace, producer: int, pipe: Connection, inherited: Sequence[Connection]
) -> None:
    """A reader's main function."""
    die_with(producer)
    for connection in inherited:
        connection.close()
    torch.set_num_threads(arguments.threads)
    try:
        serve(module.Reader(arguments.scratch, arguments.mode), pipe)
    except (EOFError, ConnectionError):  # the producer has ended, and told why
        return


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
    producing = Producing(module.Producer(arguments.scratch, arguments.mode), fork_readers(module, arguments))
    torch.set_num_threads(arguments.threads)
    # A small case first: memory that is written to in it is no longer shared when others are measured.
    producing.begin(Case(arguments.readers, 64 * KIB))
    producing.round(look=True, park=False)
    producing.end()
    with Connection(arguments.orders) as orders:
        orders.send(("ok", torch.__version__))
        if obey(orders, producing, until_fault=True):
            producing.quit()


if __name__ == "__main__":
    main()
