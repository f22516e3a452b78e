"""The tensor itself, inside its request: for small ones, and where there is no other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmlane.transport.base import Declined, Here, Payload, Scheduler, Tokenizer, Transport
from mmlane.transport.samples import Samples

SMALL = 64 << 10  # bytes up to which this is the fastest way (docs/arena.md)


class Inline(Payload):
    """A tensor. Without an invitation to bring along it stands in the request by itself, without a pointer."""

    kind = "inline"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def take(self) -> torch.Tensor:
        return self.tensor

    def peek(self) -> torch.Tensor:
        return self.tensor


class InlineTransport(Transport):
    """Carries every tensor."""

    payload = Inline
    seam = "inline"
    consequence = "the feature may be sent with the rest of its storage, which is slower"

    def __init__(self, here: Here) -> None:
        pass

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Inline | Declined:
        return Inline(compact(tensor))

    def receive(self, state: Mapping[str, Any]) -> Inline:
        return Inline(state["tensor"])


class SmallInlineTransport(InlineTransport):
    """Carries small tensors, where there is a lane: a ticket would take longer."""

    consequence = "a small feature may be sent with the rest of its storage, which is slower"

    def __init__(self, here: Here) -> None:
        self._limit = SMALL if isinstance(here, Tokenizer | Scheduler) else -1

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Inline | Declined:
        if tensor.numel() * tensor.itemsize > self._limit:
            return Declined("large")
        return super().offer(tensor, samples)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, without the rest of its storage, all of which would be pickled."""
    if tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone()
