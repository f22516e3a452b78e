"""shm_pointer: the engine's pointer to a shared-memory segment, replaced; and a lost segment, survived.

Why: on 0.5.9 the pointer unlinks while it is unpickled; up to 0.5.15 a full /dev/shm kills the process
(SIGBUS); up to 0.5.18 a segment that one rank cannot open ends the server; up to 0.5.20 every rank copies every
feature.
Upstream: #21465 (metadata-only state), #30602 (reserve, inline), #37047 (isolation), copy-on-write in 0.5.21.
How: `ShmPointerMMData` is replaced in `mm_utils`, where the engine finds it by that global name
(`mmlane.transport.pointer`), and what was made for a request that cannot be sent is released (`tokenizer_side`).
0.5.9 - 0.5.12: the engine's wrapping function is also shown what it leaves.
0.5.9 - 0.5.18: ranks agree on what is lost before they take (`scheduler_side`; below 0.5.15 that is part of
`tp_barrier`), and the two request handlers refuse a request that lost its features (`agreement`).
0.5.9: a refused request has no `prompt_tokens` in its answer, which the chat stream breaks off over; it gets one.
When it can go: with the oldest supported engine at 0.5.21; the targets go one by one before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane.compat import matrix
from mmlane.log import guarded
from mmlane.patching import Target
from mmlane_patches.tp_barrier import RECEIVING


def _answer_abort(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @wraps(original)
    def handle_abort_req(self: Any, recv_obj: Any) -> None:
        state = self.rid_to_state.get(recv_obj.rid)
        original(self, recv_obj)
        with guarded("abort", "the answer to a refused request may break off"):
            if state is not None and state.out_list:
                state.out_list[-1]["meta_info"].setdefault("prompt_tokens", 0)

    return handle_abort_req


MM_UTILS = "sglang.srt.managers.mm_utils"
MSGPACK = "sglang.srt.utils.msgpack_utils"

SPEC = matrix().spec(
    "shm_pointer",
    targets=(
        Target(
            module=MM_UTILS,
            name="ShmPointerMMData",
            signature=("(self, tensor)", "(self, tensor, precomputed_hash=)"),
            replace="mmlane.transport.pointer:with_own_segments",
            before="0.5.21",
        ),
        Target(
            module=MM_UTILS,
            name="wrap_shm_features",
            signature="(obj)",
            replace="mmlane.transport.tokenizer_side:around_wrap",
            step="mmlane.transport.tokenizer_side:offering",
            before="0.5.13",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._handle_abort_req",
            signature="(self, recv_obj)",
            replace=_answer_abort,
            before="0.5.10",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_one_request",
            signature=("(self, obj, tokenized_obj, created_time=)", "(self, tokenized_obj)"),
            replace="mmlane.transport.tokenizer_side:around_send",
            step="mmlane.transport.tokenizer_side:sending",
            before="0.5.21",
        ),
        Target(
            module="sglang.srt.managers.scheduler_components.request_receiver",
            name="SchedulerRequestReceiver._finalize_shm_features",
            signature="(self, recv_reqs)",
            replace="mmlane.transport.scheduler_side:take_before",
            since="0.5.15",
            before="0.5.19",
        ),
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.handle_generate_request",
            signature="(self, recv_req)",
            replace="mmlane.transport.agreement:refuse_lost",
            before="0.5.19",
        ),
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.handle_embedding_request",
            signature="(self, recv_req)",
            replace="mmlane.transport.agreement:refuse_lost",
            before="0.5.19",
        ),
    ),
    relies_on=(
        f"{MM_UTILS}.ShmPointerMMData",
        f"{MM_UTILS}.wrap_shm_features",
        f"{MM_UTILS}._wrap_tensor_or_list",
        f"{MM_UTILS}._wrap_shm_or_inline",
        f"{MM_UTILS}._unwrap_tensor_or_list",
        f"{MM_UTILS}.discard_shm_features",
        f"{MM_UTILS}._feature_has_shm",
        f"{MM_UTILS}._get_is_default_transport",
        "sglang.srt.managers.io_struct.AbortReq",
        f"{MSGPACK}._is_shm_pointer_mm_data",
        f"{MSGPACK}._encode_shm_pointer_mm_data",
        f"{MSGPACK}._decode_shm_pointer_mm_data",
        *RECEIVING,
    ),
)
