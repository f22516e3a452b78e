"""What a pipeline stage sends to the next: requests without the tensors that only the first stage reads.

The engine pickles requests to the next stage once it has taken their features, whole tensors that is, and each
stage broadcasts them to all of its ranks. A later stage needs an item's `pad_value`, place and grid; its feature
is read by the vision tower alone, which is on the first stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from mmlane_patches.features import items
from mmlane_patches.guard import guarded


def without_features(send: Callable[..., Any]) -> Callable[..., Any]:
    """`_pp_send_pyobj_to_next_stage(self, data, async_send=False)`: of `data`, the requests are sent lighter."""

    @wraps(send)
    def send_pyobj(self: Any, data: Any, async_send: bool = False) -> Any:
        with guarded("pipeline", "the next stage is sent all tensors, which is slower"):
            if isinstance(data, list):
                data = [_lighter(request) for request in data]
        return send(self, data, async_send)

    return send_pyobj


def _lighter(request: Any) -> Any:
    """A copy of a request without the tensors that are not needed any more; or the request itself."""
    there = items(request)
    if not any(map(_is_spare, there)):
        return request
    kept = [copy.copy(item) for item in there]
    for item in filter(_is_spare, kept):
        item.feature = None
    request = copy.copy(request)
    request.mm_inputs = copy.copy(request.mm_inputs)
    if isinstance(request.mm_inputs, dict):
        request.mm_inputs["mm_items"] = kept
    else:
        request.mm_inputs.mm_items = kept
    return request


def _is_spare(item: Any) -> bool:
    """Whether later stages do without the feature: they would only compute `pad_value` from it, which is there."""
    feature = getattr(item, "feature", None)
    tensors = feature if isinstance(feature, list | tuple) else [feature]
    return getattr(item, "pad_value", None) is not None and all(isinstance(t, torch.Tensor) for t in tensors)
