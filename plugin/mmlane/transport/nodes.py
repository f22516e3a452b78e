"""Several nodes: which ranks take part, and on which node each is.

They tell each other by the default store. The first rank looks, and never waits: a node without mmlane is served
as the engine serves it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mmlane import __version__, host


class Node(NamedTuple):
    """A machine of the launch, and the ranks on it that receive the same requests. The first of them leads."""

    name: str
    ranks: list[int]


Route = list[Node]  # that of the rank which receives requests comes first


def name_of(number: int) -> str:
    """What a node is called: where ranks are that can share a lane, and by number, as some share a machine."""
    return f"{number}:{host.lane_scope()}"


def announce(name: str) -> None:
    """Announce that this rank takes part, and on which node. Needs torch.distributed initialized."""
    announced = json.dumps({"version": __version__, "node": name})
    distributed_c10d._get_default_store().set(_key(dist.get_rank()), announced)


def _key(rank: int) -> str:
    return f"mmlane/node/{rank}"


def find_route(ranks: Sequence[int]) -> Route | None:
    """Where the ranks are; None if not all have announced themselves. Raises ValueError if they do not fit."""
    store = distributed_c10d._get_default_store()
    keys = [_key(rank) for rank in ranks]
    if not store.check(keys):
        return None
    route: dict[str, list[int]] = {}
    for rank, key in zip(ranks, keys, strict=True):
        announced = json.loads(store.get(key))
        if (version := announced.get("version")) != __version__:
            raise ValueError(
                f"rank {rank} runs mmlane {version}, this one {__version__}: install one on all nodes"
            )
        route.setdefault(announced["node"], []).append(rank)
    if len(route) > len({name.partition(":")[0] for name in route}):
        raise ValueError("ranks of one node are in different network namespaces, and cannot share a lane")
    return [Node(*entry) for entry in route.items()]
