"""fan_out: with n > 1 each sample has multimodal items of its own.

Why: the requests of the n samples (and the one that warms the prefix) are shallow copies of one; they share their
items, so the first that is sent turns the items of all into one pointer, and the first receiver unlinks it.
Upstream: #24231.
How: a request is given its own `mm_inputs` and items just before it is sent, by `_send_one_request`, which every
sample goes through. Tensors are not copied, and the request's old items are not kept.
When it can go: with the oldest supported engine at 0.5.13.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmlane.compat import matrix
from mmlane.log import guarded
from mmlane.patching import Target


def own_items(request: Any) -> None:
    """Give a tokenized request `mm_inputs` and items of its own; their tensors stay shared."""
    mm_inputs = getattr(request, "mm_inputs", None)
    if not mm_inputs:
        return
    own = copy.copy(mm_inputs)
    if isinstance(own, dict):
        own["mm_items"] = [copy.copy(item) for item in own.get("mm_items", [])]
    else:
        own.mm_items = [copy.copy(item) for item in own.mm_items]
    request.mm_inputs = own


@contextmanager
def _with_own_items(manager: Any, request: Any) -> Iterator[None]:
    with guarded("fan_out", "with n > 1 the samples of this request share their items"):
        own_items(request)
    yield


SPEC = matrix().spec(
    "fan_out",
    targets=(
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_one_request",
            signature=("(self, obj, tokenized_obj, created_time=)", "(self, tokenized_obj)"),
            replace="mmlane.transport.tokenizer_side:around_send",
            step=_with_own_items,
            before="0.5.13",
        ),
    ),
)
