"""arena: features travel by the lane: one copy in, none out, no barrier, nothing to leak.

Why: on every release a feature costs a fresh segment, a page-faulting copy into it, a barrier and (from 0.5.19) an
all-reduce, once for each of n samples; and a crash leaves its segments behind.
Upstream: none.
How: a class that can carry a ticket stands in front of `ShmPointerMMData` (`tickets`), so that the engine's own
conditions decide what is wrapped. Ranks take tickets just before they agree on segments, so that a request whose
features all came by lane has nothing left to agree on: up to 0.5.18 in `receiving`, which is ours there, from
0.5.19 before the engine's own function. `TokenizerManager` and `Scheduler` say who takes part (`lanes`). With
pipeline stages, the first takes, and sends the others what they need (`pipeline`).
When it can go: when a release has a transport of its own that needs neither.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

from mmlane import settings
from mmlane.compat import matrix
from mmlane.patching import Target
from mmlane_patches.guard import guarded


def _producing(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with guarded("start", "this tokenizer has no lane: features go by shared-memory segments"):
            from mmlane_patches import lanes

            wanted = settings.read(os.environ)
            lanes.become_producer(
                self,
                signature.bind(self, *args, **kwargs).arguments["server_args"],
                multimodal=getattr(self.model_config, "is_multimodal", True),
                capacity=wanted.capacity,
                pinned=wanted.pinned,
            )

    return __init__


def _reading(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with guarded("start", "this rank joins no lane: features go by shared-memory segments"):
            become_rank(self, *args, **kwargs)

    def become_rank(self: Any, *args: Any, **kwargs: Any) -> None:
        from mmlane_patches import lanes

        given = signature.bind(self, *args, **kwargs).arguments
        ranks: Any = SimpleNamespace(**given)
        if "dp_rank" not in given:  # from 0.5.21 on
            ranks = sys.modules["sglang.srt.runtime_context"].get_parallel()
        lanes.become_rank(
            given["server_args"],
            ranks.dp_rank,
            ranks.pp_rank,
            ranks.tp_rank,
            pinned=settings.read(os.environ).pinned,
        )

    return __init__


SPEC = matrix().spec(
    "arena",
    targets=(
        Target(
            module="sglang.srt.managers.mm_utils",
            name="ShmPointerMMData",
            signature=("(self, tensor)", "(self, tensor, precomputed_hash=)"),
            replace="mmlane_patches.tickets:in_front_of",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager.__init__",
            signature=(
                "(self, server_args, port_args)",
                "(self, server_args, port_args, *, start_pd_bootstrap_service=)",
            ),
            replace=_producing,
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_one_request",
            signature=("(self, obj, tokenized_obj, created_time=)", "(self, tokenized_obj)"),
            replace="mmlane_patches.sending:by_lane",
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
            replace="mmlane_patches.sending:with_samples",
        ),
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.__init__",
            signature=(
                "(self, server_args, port_args, gpu_id, tp_rank, moe_ep_rank, pp_rank, attn_cp_rank, moe_dp_rank, "
                "dp_rank)",
                "(self, server_args, port_args)",
            ),
            replace=_reading,
        ),
        Target(
            module="sglang.srt.managers.scheduler_components.request_receiver",
            name="SchedulerRequestReceiver._finalize_shm_features",
            signature="(self, recv_reqs)",
            replace="mmlane_patches.receiving:take_tickets_before",
            since="0.5.19",
        ),
        Target(
            module="sglang.srt.managers.scheduler_pp_mixin",
            name="SchedulerPPMixin._pp_send_pyobj_to_next_stage",
            signature="(self, data, async_send=)",
            replace="mmlane_patches.pipeline:without_features",
        ),
    ),
)
