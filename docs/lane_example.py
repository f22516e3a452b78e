"""One process sends tensors to two others by lane: python docs/lane_example.py"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

from mmlane.lane import Invitation, Lane, Reader, Refused


def read(number: int, invitation: Invitation, tickets: Connection) -> None:
    """A reading process: take the tensor of each ticket that comes, until None does."""
    with Reader("tp", number) as reader:
        reader.join(invitation)
        while (ticket := tickets.recv()) is not None:
            tensor = reader.take(ticket, mode="view")
            total = float(tensor.sum())
            del tensor  # releases it
            tickets.send(total)


def main() -> None:
    """The producing process."""
    spawn = multiprocessing.get_context("spawn")
    with Lane(readers={"tp": 2}) as lane:
        pipes = []
        for number in range(2):
            here, there = spawn.Pipe()
            spawn.Process(target=read, args=(number, lane.invitation, there), daemon=True).start()
            pipes.append(here)
        if not lane.wait_open(timeout=60):
            raise SystemExit("not all readers have joined within a minute")

        pixels = torch.rand(3, 1024, 1024)
        ticket = lane.put(pixels)
        if isinstance(ticket, Refused):  # send the tensor some other way
            raise SystemExit(f"refused, {ticket.cause}: {ticket.detail}")
        print(f"{pixels.nbytes} bytes behind a ticket of {len(ticket)}, sum {float(pixels.sum()):.1f}")
        for pipe in pipes:
            pipe.send(ticket)
            print(f"a reader's sum {pipe.recv():.1f}")
        for pipe in pipes:
            pipe.send(None)

        stats = lane.stats()
        print(
            f"{stats.puts} put, {stats.tickets} tickets out, {stats.used_bytes} bytes used,"
            f" {stats.committed_bytes} committed"
        )


if __name__ == "__main__":
    main()
