"""A reading process: takes, sums, sums again, frees, and reports when each was done.

Forked by the producing process (producing.py) and told what to do over the pipe that also carries the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from mmlane.bench.clock import stamp
from mmlane.bench.contract import Reader
from mmlane.bench.memory import tidy
from mmlane.bench.payload import sample, sums


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
    there = taken if reader.device is None else [_on_device(tensors, reader.device) for tensors in taken]
    found = [sums(tensors) for tensors in taken] if reader.device is None else []
    read_at = stamp()
    first = read_at - before

    # Together again, so that both sums have the same company.
    pipe.send("read")
    pipe.recv()
    before = stamp()
    again = [sums(tensors) for tensors in there]
    warm = stamp() - before
    if reader.device is not None:
        found, warm = again, 0
    elif again != found:
        raise ValueError("the same tensors had other sums when read again")
    samples = [sample(tensors) for tensors in taken] if look else []

    pipe.send("holding")
    pipe.recv()
    before = stamp()
    del taken, there
    reader.free()
    free = stamp() - before
    pipe.send(Reading(take, read_at, first, warm, free, found, samples))


def _on_device(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Copies there, of all of them; back when they are there."""
    copies = [tensor.to(device, non_blocking=True, copy=True) for tensor in tensors]
    torch.cuda.synchronize(device)
    return copies


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
