"""The producing process of one way, and the readers that it forks. The worker that runs it gives it its orders."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mmlane.bench.case import Case
from mmlane.bench.clock import seconds, stamp
from mmlane.bench.contract import Producer
from mmlane.bench.memory import tidy
from mmlane.bench.payload import Payload, sample, sums
from mmlane.bench.reading import Reading, serve
from mmlane.bench.rounds import Round
from mmlane.bench.sizes import KIB
from mmlane.bench.workers import die_with

_LEAST = 64 * KIB
_ENDING_S = 5.0  # for a process that has closed its pipe to be gone


@dataclass(frozen=True)
class Setup:
    """What readers are started with. `mode`: of the way; `scratch`: its directory; `threads`: torch's."""

    readers: int
    threads: int
    scratch: Path
    mode: str | None


class Producing:
    """A producer and its readers, of which a case uses as many as it needs. The public methods are the orders."""

    def __init__(self, producer: Producer, readers: Sequence[tuple[Connection, BaseProcess]]) -> None:
        self._producer = producer
        self._readers = readers
        self._pids = [os.getpid(), *(process.pid for _, process in readers if process.pid)]
        self._case = Case(len(readers), _LEAST)
        self._pipes: Sequence[Connection] = ()  # of the readers in this case
        self._payload: Payload | None = None
        self._memory_before = 0

    def begin(self, case: Case) -> None:
        self._case = case
        self._pipes = [pipe for pipe, _ in self._readers[: case.readers]]
        self._payload = Payload(case.nbytes, case.items)
        self._memory_before = self._in_use() or 0
        address = self._producer.open(case)
        for rank, pipe in enumerate(self._pipes):
            with self._alive(rank):
                pipe.send(("open", address, rank, case))
        self._gather()
        self._producer.ready()

    def end(self) -> None:
        self._tell(("close",))
        self._gather()
        self._producer.close()
        self._payload = None
        tidy()

    def is_settled(self) -> bool:
        """Whether the rounds from now on count, as far as the way is concerned."""
        return self._producer.is_settled()

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
            for rank, (pipe, message) in enumerate(zip(self._pipes, messages, strict=True)):
                with self._alive(rank):
                    pipe.send_bytes(message)
        self._gather()
        self._tell("sum again")
        self._gather()
        held = self._in_use() if look else None
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
            memory_bytes=None if held is None else held - self._memory_before,
        )

    def quit(self) -> None:
        """Have the readers end."""
        for pipe, process in self._readers:
            pipe.send(("quit",))
            process.join()

    def _in_use(self) -> int | None:
        """Bytes of memory that the way has in use, where that is asked for."""
        return None

    def _tell(self, order: object) -> None:
        for rank, pipe in enumerate(self._pipes):
            with self._alive(rank):
                pipe.send(order)

    def _gather(self) -> list[Any]:
        """What each reader answers."""
        answers = []
        for rank, pipe in enumerate(self._pipes):
            with self._alive(rank):
                answers.append(pipe.recv())
        return answers

    @contextmanager
    def _alive(self, rank: int) -> Iterator[None]:
        """Raises RuntimeError when the reader at the other end of a pipe has ended."""
        try:
            yield
        except (EOFError, ConnectionError):
            process = self._readers[rank][1]
            process.join(_ENDING_S)
            raise RuntimeError(f"reader {rank} ended, exit code {process.exitcode}") from None


def _verify(reading: Reading, n: int, expected: Sequence[int], expected_sample: int | None) -> None:
    if [list(found) for found in reading.sums] != [list(expected)] * n:
        raise ValueError("a reader's tensors have other sums than the source")
    if expected_sample is not None and list(reading.samples) != [expected_sample] * n:
        raise ValueError("a reader's tensors have other pages than the source")


def fork_readers(module: Any, setup: Setup) -> list[tuple[Connection, BaseProcess]]:
    """The readers, idle, with our ends of their pipes. They have what the module imported, without its cost."""
    fork = multiprocessing.get_context("fork")
    readers: list[tuple[Connection, BaseProcess]] = []
    for _ in range(setup.readers):
        ours, theirs = fork.Pipe()
        inherited = [ours, *(pipe for pipe, _ in readers)]
        process = fork.Process(target=read, args=(module, setup, os.getpid(), theirs, inherited), daemon=True)
        process.start()
        theirs.close()
        readers.append((ours, process))
    return readers


def read(module: Any, setup: Setup, producer: int, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """A reader's main function."""
    die_with(producer)
    for connection in inherited:
        connection.close()
    torch.set_num_threads(setup.threads)
    try:
        serve(module.Reader(setup.scratch, setup.mode), pipe)
    except (EOFError, ConnectionError):  # the producer has ended, and told why
        return
