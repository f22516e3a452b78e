"""How a rank passes requests on to the next pipeline stage: without the tensors that only the first one reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from mmlane.engine.requests import features_of, is_padded, items, own_items
from mmlane.log import guarded


def without_features(send: Callable[..., Any]) -> Callable[..., Any]:
    """`_pp_send_pyobj_to_next_stage(self, data, async_send=False)`: of `data`, the requests are sent lighter.

    The engine pickles requests to the next stage once it has taken their features, whole tensors that is, and each
    stage broadcasts them to all of its ranks. A later stage needs an item's `pad_value`, place and grid; its
    feature is read by the vision tower alone, which is on the first stage.
    """

    @wraps(send)
    def send_pyobj(self: Any, data: Any, async_send: bool = False) -> Any:
        with guarded("pipeline", "the next stage is sent all tensors, which is slower"):
            if isinstance(data, list):
                data = [_lighter(request) for request in data]
        return send(self, data, async_send)

    return send_pyobj


def _lighter(request: Any) -> Any:
    """A copy of a request without the tensors that are not needed any more; or the request itself."""
    if not any(map(_is_spare, items(request))):
        return request
    request = copy.copy(request)
    own_items(request)
    for item in filter(_is_spare, items(request)):
        item.feature = None
    return request


def _is_spare(item: Any) -> bool:
    """Whether later stages do without the feature: they would only compute `pad_value` from it, which is there."""
    return is_padded(item) and all(isinstance(value, torch.Tensor) for value in features_of(item))
