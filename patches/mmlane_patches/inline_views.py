"""inline_views: a tensor inside of a request is pickled without the rest of its storage.

Why: from 0.5.10 on the tokenizer splits the features of a request's images, which are then views of one tensor.
Where they are sent inside of the request, pickle writes the whole storage for each: 32 images take 32 times their
bytes.
Upstream: #33388, #33391 (open).
How: what `wrap_shm_features` leaves in a request, and all that is in a batch, is copied where it does not own its
storage: features, embeddings and auxiliary tensors, alone and in lists. With n > 1 all samples share the copy
(`_handle_batch_request`).
When it can go: when a release pickles no more than a tensor's own bytes.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target

MM_UTILS = "sglang.srt.managers.mm_utils"

SPEC = matrix().spec(
    "inline_views",
    targets=(
        Target(
            module=MM_UTILS,
            name="wrap_shm_features",
            signature="(obj)",
            replace="mmlane.transport.tokenizer_side:around_wrap",
            step="mmlane.transport.compacting:compacting",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_batch_request",
            signature=("(self, obj, tokenized_objs, created_time=)", "(self, tokenized_objs)"),
            replace="mmlane.transport.tokenizer_side:around_send_batch",
            step="mmlane.transport.compacting:compacting",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._handle_batch_request",
            signature=(
                "(self, obj, request=, created_time=)",
                "(self, obj, request=)",
                "(self, obj, request=, request_rids=)",
                "(self, obj, request, request_states)",
            ),
            replace="mmlane.transport.sharing:around_samples",
            step="mmlane.transport.sharing:with_samples",
        ),
    ),
    relies_on=(
        f"{MM_UTILS}.get_new_expanded_mm_items",
        f"{MM_UTILS}._slice_value",
        f"{MM_UTILS}._slice_model_data",
        f"{MM_UTILS}._wrap_tensor_or_list",
        f"{MM_UTILS}._wrap_shm_or_inline",
    ),
)
