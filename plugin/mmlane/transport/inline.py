"""The tensor itself, inside its request: for small ones, and where there is no other way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmlane.engine.requests import Place
from mmlane.transport.base import Declined, Here, Payload, Scheduler, Tokenizer, Transport
from mmlane.transport.samples import Samples

SMALL = 64 << 10  # bytes up to which this is the fastest way (docs/engine.md)


class Inline(Payload):
    """A tensor. Without an invitation to bring along it stands in the request without a pointer."""

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
    where = "inline"
    consequence = "the feature may be sent with the rest of its storage, which is slower"

    def __init__(self, here: Here) -> None:
        pass

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Inline | Declined:
        return Inline(compact(tensor, samples))

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


def is_sent(value: Any) -> bool:
    """Whether it is a tensor for us: those on a device travel by the engine's own ways."""
    return isinstance(value, torch.Tensor) and value.is_cpu


def sent_from(there: Iterable[Place]) -> list[torch.Tensor]:
    """The tensors for us that stand in some places, each as often as it does."""
    return [value for place in there for value in place.values() if is_sent(value)]


def compact(tensor: torch.Tensor, samples: Samples | None = None) -> torch.Tensor:
    """The tensor, without the rest of its storage, all of which would be pickled.

    Its own storage stays as it is: others may use it. samples: those that share one such copy.
    """
    if is_compact(tensor):
        return tensor
    return tensor.clone() if samples is None else samples.copied(tensor, torch.clone)


def is_compact(tensor: torch.Tensor) -> bool:
    """Whether its storage, which is pickled as a whole, holds nothing else."""
    return (
        tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.itemsize
    )
