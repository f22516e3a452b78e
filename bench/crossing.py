"""Features between nodes, without an engine: python -m bench.crossing

Nodes are network namespaces of this machine. On the first, a rank sends tensors; on each other one, a leader
receives them into a lane with so many readers, each a process. Columns, in milliseconds, medians:

crossing: from the first rank's `Departure.send` until all leaders have answered with tickets.
read: from there until every reader of every node has taken the tensor and looked at each page.
direct: a send to each other node at the same time, by `torch.distributed`, as a peer: no chain and no lane.
broadcast: `torch.distributed.broadcast` of as many bytes to one process of each node, as the engine broadcasts.

All nodes share this machine's cores. With --rate each link is as slow as that (`tc`, such as 2gbit), so that
the link limits, as between machines, and not the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from typing import Any

from bench.harness import command, machine, tables
from bench.harness.nodes import run_on_each
from bench.harness.spawned import Spawned, gather
from bench.harness.tables import Grid
from devkit.nodes import Network

NODES = (2, 3, 4, 8)
READERS = 4
COLUMNS = ("crossing", "read", "direct", "broadcast")
PAGE = 4096


def measured(nodes: int, readers: int, nbytes: int, times: int, rate: str | None) -> dict[str, list[float]]:
    """Seconds of each column."""
    with Network(nodes, rate) as network:
        found: dict[str, list[float]] = run_on_each(network, "bench.crossing", nodes, readers, nbytes, times)
        return found


def end_of_link(rank: int, nodes: int, readers: int, nbytes: int, times: int, address: str) -> None:
    """One node: the first rank, or a leader with its readers."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=nodes)
    node: Any = First(nodes) if rank == 0 else Leader(rank, nodes, readers)
    payload = torch.ones(nbytes, dtype=torch.uint8)
    taken: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for _ in range(times + 1):
        dist.barrier()
        began = time.perf_counter()
        landed: list[Any] = [node.crossed(payload) if rank == 0 else None]
        crossed = time.perf_counter()
        dist.broadcast_object_list(landed)
        if rank:
            node.read(landed[0][str(rank)][0])
        dist.barrier()
        taken["read"].append(time.perf_counter() - crossed)
        taken["crossing"].append(crossed - began)
        began = time.perf_counter()
        if rank:
            dist.recv(payload, 0)
        else:
            for moving in [dist.isend(payload, other) for other in range(1, nodes)]:
                assert moving is not None
                moving.wait()
        dist.barrier()
        taken["direct"].append(time.perf_counter() - began)
        began = time.perf_counter()
        dist.broadcast(payload, 0)
        dist.barrier()
        taken["broadcast"].append(time.perf_counter() - began)
    print(json.dumps({name: values[1:] for name, values in taken.items()}), flush=True)
    os._exit(0)  # threads of the link wait for messages that will not come


class First:
    """The first rank's end."""

    def __init__(self, nodes: int) -> None:
        from mmlane.transport.crossing import Departure
        from mmlane.transport.wire import TorchWire

        self._over = threading.Event()
        names = [str(rank) for rank in range(1, nodes)]
        ranks = list(range(nodes))
        self._departure = Departure(names, lambda: TorchWire(ranks), self._over.set, lambda *_: None)
        while self._departure.state == "opening":
            time.sleep(0.01)

    def crossed(self, payload: Any) -> Any:
        """The tickets, by node."""
        from mmlane.transport.crossing import Crossing, Piece

        crossing = Crossing([Piece(0, payload.dtype, tuple(payload.shape), True, False)], [payload])
        self._over.clear()
        self._departure.send(crossing)
        while not crossing.is_over:
            self._over.wait()
            self._over.clear()
        return crossing.landed


class Leader:
    """A leader's end, and the readers of its node."""

    def __init__(self, rank: int, nodes: int, readers: int) -> None:
        from mmlane.lane import Lane
        from mmlane.transport.crossing import Landing
        from mmlane.transport.wire import TorchWire

        made = Lane({"node": readers})
        self._readers = [Spawned(Taking, made.invitation, number) for number in range(readers)]
        gather(self._readers)
        ranks = list(range(nodes))
        self._landing = Landing(rank, nodes, lambda: TorchWire(ranks), lambda: made, {}, lambda *_: None)

    def read(self, ticket: bytes) -> None:
        """Have all readers take it, and wait until they have looked at it."""
        for reader in self._readers:
            reader.ask("look", ticket)
        gather(self._readers)


class Taking:
    """A reader's process."""

    def __init__(self, invitation: Any, number: int) -> None:
        from mmlane.lane import Reader

        self._reader = Reader("node", number)
        self._reader.join(invitation)

    def look(self, ticket: bytes) -> None:
        """Take a tensor, and look at each page."""
        tensor = self._reader.take(ticket, "view")
        assert int(tensor[::PAGE].sum()) == len(tensor[::PAGE])

    def close(self) -> None:
        self._reader.close()


def main() -> None:
    parser = command.parser("crossing", __doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES, metavar="N")
    parser.add_argument("--readers", type=int, default=READERS, help="on each node but the first (4)")
    parser.add_argument("--mib", type=int, default=64, help="payload (64)")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rate", help="of each node's link, such as 2gbit; without it what the machine can do")
    parser.add_argument("--end", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.end:
        rank, nodes, readers, nbytes, times, address = options.end
        end_of_link(int(rank), int(nodes), int(readers), int(nbytes), int(times), address)
    else:
        console = tables.console()
        console.print(machine.in_short())
        rate = options.rate or "as fast as the machine"
        console.print(f"{options.mib} MiB, {options.readers} readers a node, links: {rate}")
        middle: dict[int, dict[str, float]] = {}
        for nodes in options.nodes:
            found = measured(nodes, options.readers, options.mib << 20, options.times, options.rate)
            middle[nodes] = {name: statistics.median(found[name]) for name in COLUMNS}
        first = middle[options.nodes[0]]
        rows = [
            [str(nodes), *(f"{of[name] * 1e3:.0f} ({of[name] / first[name]:.1f} x)" for name in COLUMNS)]
            for nodes, of in middle.items()
        ]
        tables.render([Grid("Between nodes", ["nodes", *(f"{name}, ms" for name in COLUMNS)], rows)], console)


if __name__ == "__main__":
    main()
