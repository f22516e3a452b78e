"""From hand to hand: what a node's leader had to keep in its own memory, because its lane had no room.

Which ranks a leader serves, and how features get to it, is in `nodes` and `link`.
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


class InHand(Payload):
    """A tensor that the leader has, and gives to the other ranks of its node when all of them take it.

    All of them receive the same requests, so they take in the same order.
    """

    kind = "hand"

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


class HandTransport(Transport):
    """Declines all: only leaders make its payloads (`link`). kept: by key, the tensors that this leader has."""

    payload = InHand
    where = "hand"
    consequence = "nothing"

    def __init__(self, here: Here) -> None:
        self.kept: dict[int, torch.Tensor] = {}

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Declined:
        return Declined("leaders only")

    def receive(self, state: Mapping[str, Any]) -> InHand:
        return InHand(state, self.kept)
