"""Lists and precomputed embeddings by pointer, with the engine's own `wrap_shm_features` (0.5.9 - 0.5.12).

Those versions wrap an item's `feature` when it is a tensor (from 0.5.11 also a list of tensors). What they
leave is shown to the same function again, each tensor as the `feature` of a stand-in, so that its own
conditions (transport mode, skip_tokenizer_init) decide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from mmlane_patches.features import replace_values
from mmlane_patches.guard import guarded


class _Inputs(dict[str, Any]):
    """`mm_inputs` of one item, readable as the dict of 0.5.9 and as the object of later versions."""

    def __init__(self, item: Any) -> None:
        super().__init__(mm_items=[item])
        self.mm_items = self["mm_items"]


def wrap_everything(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`wrap_shm_features(obj)` that sends every CPU tensor in the items by pointer. Returns `obj`, changed."""

    def pointer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_cpu:
            return value
        item = SimpleNamespace(feature=value)
        wrap(SimpleNamespace(mm_inputs=_Inputs(item)))
        return item.feature

    @wraps(wrap)
    def wrap_shm_features(obj: Any) -> Any:
        with guarded("wrapping", "lists and embeddings of this request are sent inline, which is slower"):
            replace_values(obj, pointer)
        return wrap(obj)

    return wrap_shm_features
