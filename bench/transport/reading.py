"""A reading process: takes, sums, sums again, frees, and reports when each was done.

Forked by the producing process (worker.py) and told what to do over the one pipe that also carries the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from torch import Tensor

from bench.harness.clock import stamp
from bench.harness.memory import tidy
from bench.transport.contract import Reader
from bench.transport.payload import sample, sums


@dataclass(frozen=True)
class Reading:
    """What one reader saw of one round; durations and `read_at` in nanoseconds."""

    take: int
    read_at: int
    first: int
    warm: int
    free: int
    sums: Sequence[Sequence[int]]
    samples: Sequence[int]


def serve(reader: Reader, pipe: Connection) -> None:
    """Do as told until told to end."""
    while True:
        order, *arguments = pipe.recv()
        match order:
            case "open":
                reader.open(*arguments)
                pipe.send("opened")
            case "round":
                n, look = arguments
                _round(reader, pipe, n, look)
            case "one way":
                (count,) = arguments
                _one_way(reader, pipe, count)
            case "close":
                reader.close()
                tidy()
                pipe.send("closed")
            case _:
                return


def _round(reader: Reader, pipe: Connection, n: int, look: bool) -> None:
    taken: list[Sequence[Tensor]] = []
    take = 0
    pipe.send("ready")
    for _ in range(n):
        message = pipe.recv_bytes()
        before = stamp()
        taken.append(reader.take(message))
        take += stamp() - before

    before = stamp()
    found = [sums(tensors) for tensors in taken]
    read_at = stamp()
    first = read_at - before

    # Together again, so that both sums have the same company.
    pipe.send("read")
    pipe.recv()
    before = stamp()
    again = [sums(tensors) for tensors in taken]
    warm = stamp() - before
    if again != found:
        raise ValueError("the same tensors had other sums when read again")
    samples = [sample(tensors) for tensors in taken] if look else []

    pipe.send("holding")
    pipe.recv()
    before = stamp()
    del taken
    reader.free()
    free = stamp() - before
    pipe.send(Reading(take, read_at, first, warm, free, found, samples))


def _one_way(reader: Reader, pipe: Connection, count: int) -> None:
    pipe.send("ready")
    for _ in range(count):
        pipe.recv_bytes()
        pipe.send(stamp())
        message = pipe.recv_bytes()
        tensors = reader.take(message)
        arrived = stamp()
        found = sums(tensors)
        del tensors
        reader.free()
        pipe.send((arrived, found))
