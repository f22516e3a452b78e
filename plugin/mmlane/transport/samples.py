"""What the samples of one prompt (n > 1) share in a lane."""

from __future__ import annotations

from typing import Any

import torch

from mmlane.lane import Lane, Refused, Reservation


class Samples:
    """The requests that the engine makes of one with n > 1, all with the same tensors: what is in the lane once.

    requests: how many there will be with each tensor. A prompt's first request is answered before the others are
    sent, so the copy has to outlive that one's ticket. It does not live longer than the last of them is sent.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        # By the tensor's id, which it keeps from others, and what of it could be changed without copying: the
        # tensor, its copy, and how many requests are left.
        self._copies: dict[Any, tuple[torch.Tensor, Reservation, int]] = {}

    def put(self, lane: Lane, tensor: torch.Tensor) -> bytes | Refused:
        """A ticket on the one copy of a tensor."""
        same = id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        kept = self._copies.pop(same, None)
        copy = lane.copy(tensor) if kept is None else kept[1]
        if isinstance(copy, Refused):
            return copy
        left = self._requests if kept is None else kept[2]
        if left > 1:
            self._copies[same] = tensor, copy, left - 1
        return copy.publish()

    def close(self) -> None:
        """The request has ended, whether it sent all of them or not."""
        self._copies.clear()
