"""fan_out: with n > 1 each sample has multimodal items of its own.

Why: the requests of the n samples (and the one that warms the prefix) are shallow copies of one; they share their
items, so the first that is sent turns the items of all into one pointer, and the first receiver unlinks it.
Upstream: #24231.
How: a request is given its own `mm_inputs` and items just before it is sent, by `_send_one_request`, which every
sample goes through. Tensors are not copied, and the request's old items are not kept.
When it can go: with the oldest supported engine at 0.5.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmlane.compat import matrix
from mmlane.engine.requests import own_items
from mmlane.log import guarded
from mmlane.patching import Target


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
    relies_on=(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request",
        "sglang.srt.managers.mm_utils.wrap_shm_features",
    ),
)
