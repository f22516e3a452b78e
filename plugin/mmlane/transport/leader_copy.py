"""Copies that a node's leader keeps in its own memory, because its lane had no room, and sends to its ranks.

Which ranks a leader serves, and how features get to it, is in `nodes` and `crossing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from mmlane.transport.base import Declined, Here, Payload, Transport
from mmlane.transport.samples import Samples
from mmlane.transport.wire import bytes_of

_TAG = 0x6D6D  # apart from what the engine sends from rank to rank


class LeaderCopy(Payload):
    """A tensor that the leader has, and gives to the other ranks of its node when all of them take it.

    All of them receive the same requests, so they take in the same order.
    """

    kind = "leader_copy"

    def __init__(self, state: Mapping[str, Any], kept: dict[int, torch.Tensor]) -> None:
        self._state = dict(state)
        self._kept = kept
        self._taken: torch.Tensor | None = None

    def state(self) -> dict[str, Any]:
        return {name: self._state[name] for name in ("key", "ranks", "shape", "dtype")}

    def take(self) -> torch.Tensor:
        """As `Payload.take`. Raises RuntimeError if a rank is gone, KeyError in a leader that has it not."""
        if self._taken is None:
            leader, *others = self._state["ranks"]
            if dist.get_rank() == leader:
                tensor = self._kept.pop(self._state["key"])
                send: Any = dist.isend
                for moving in [send(bytes_of(tensor), rank, tag=_TAG, group=_group()) for rank in others]:
                    moving.wait()
            else:
                tensor = torch.empty(self._state["shape"], dtype=self._state["dtype"], device="cpu")
                dist.recv(bytes_of(tensor), leader, tag=_TAG, group=_group())
            self._taken = tensor
        return self._taken

    def release(self) -> None:
        self._kept.pop(self._state["key"], None)

    def peek(self) -> torch.Tensor | None:
        return self._taken


def _group() -> Any:
    """The engine's CPU group of all ranks, by which its pipeline stages send each other requests."""
    from sglang.srt.distributed.parallel_state import get_world_group

    return get_world_group().cpu_group


class LeaderCopyTransport(Transport):
    """Declines all: only leaders make its payloads (`crossing`). kept: by key, what this leader has."""

    payload = LeaderCopy
    where = "leader_copy"
    consequence = "nothing"

    def __init__(self, here: Here) -> None:
        self.kept: dict[int, torch.Tensor] = {}

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Declined:
        return Declined("leaders only")

    def receive(self, state: Mapping[str, Any]) -> LeaderCopy:
        return LeaderCopy(state, self.kept)
