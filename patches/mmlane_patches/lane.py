"""lane: features travel by the lane: one copy in, none out, no barrier, nothing to leak.

Why: on every release a feature costs a fresh segment, a page-faulting copy into it, a barrier and (from 0.5.19) an
all-reduce, once for each of n samples; and a crash leaves its segments behind.
Upstream: none.
How: the engine's own conditions decide of which tensors it makes a `ShmPointerMMData`. That class is ours
(`mmlane.transport.pointer`): up to 0.5.20 by `shm_pointer`, from 0.5.21 on by this patch, with the engine's own
class for segments. `TokenizerManager.__init__` and `Scheduler.__init__` make the two sides, `tokenizer_side` and
`scheduler_side` in `mmlane.transport`; the controller of replicas has one as well, where some are on other nodes.
Ranks take tickets just before they agree on segments, so that a request whose features all came by lane has
nothing left to agree on: up to 0.5.18 where `tp_barrier` and `shm_pointer` take, from 0.5.19 on before the
engine's own function. With pipeline stages, the first takes, and sends the others what they need.
When it can go: when a release has a transport of its own that needs neither.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane import settings
from mmlane.compat import matrix
from mmlane.engine.topology import place_of
from mmlane.log import guarded
from mmlane.patching import Target
from mmlane_patches.tp_barrier import RECEIVING


def _tokenizer(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with guarded("start", "this tokenizer has no lane: features go by shared-memory segments"):
            from mmlane.transport import tokenizer_side

            wanted = settings.read(os.environ)
            server_args = signature.bind(self, *args, **kwargs).arguments["server_args"]
            tokenizer_side.start(
                self,
                server_args,
                capacity=wanted.capacity,
                pinned=wanted.pinned_of_one(server_args.tokenizer_worker_num),
                mode=wanted.mode,
            )

    return __init__


def _scheduler(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        with guarded("start", "this rank joins no lane: features go by shared-memory segments"):
            from mmlane.transport import scheduler_side

            wanted = settings.read(os.environ)
            given = signature.bind(self, *args, **kwargs).arguments
            scheduler_side.start(
                self,
                given["server_args"],
                place_of(given),
                capacity=wanted.capacity,
                pinned=wanted.pinned_of_one(1),
            )

    return __init__


MM_UTILS = "sglang.srt.managers.mm_utils"
CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
MSGPACK = "sglang.srt.utils.msgpack_utils"

SPEC = matrix().spec(
    "lane",
    targets=(
        Target(
            module=MM_UTILS,
            name="ShmPointerMMData",
            signature=("(self, tensor)", "(self, tensor, precomputed_hash=)"),
            replace="mmlane.transport.pointer:with_engine_segments",
            since="0.5.21",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager.__init__",
            signature=(
                "(self, server_args, port_args)",
                "(self, server_args, port_args, *, start_pd_bootstrap_service=)",
            ),
            replace=_tokenizer,
        ),
        Target(
            module=MM_UTILS,
            name="wrap_shm_features",
            signature="(obj)",
            replace="mmlane.transport.tokenizer_side:around_wrap",
            step="mmlane.transport.tokenizer_side:offering",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_batch_request",
            signature=("(self, obj, tokenized_objs, created_time=)", "(self, tokenized_objs)"),
            replace="mmlane.transport.tokenizer_side:around_send_batch",
            step="mmlane.transport.tokenizer_side:offering",
        ),
        Target(
            module="sglang.srt.managers.tokenizer_manager",
            name="TokenizerManager._send_one_request",
            signature=("(self, obj, tokenized_obj, created_time=)", "(self, tokenized_obj)"),
            replace="mmlane.transport.tokenizer_side:around_send",
            step="mmlane.transport.tokenizer_side:sending",
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
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.__init__",
            signature=(
                "(self, server_args, port_args, gpu_id, tp_rank, moe_ep_rank, pp_rank, attn_cp_rank, moe_dp_rank, "
                "dp_rank)",
                "(self, server_args, port_args)",
            ),
            replace=_scheduler,
        ),
        Target(
            module="sglang.srt.managers.data_parallel_controller",
            name="DataParallelController.__init__",
            signature=(
                "(self, server_args, port_args, run_scheduler_process_func)",
                "(self, server_args, port_args, run_scheduler_process_func, prelaunched_schedulers=)",
            ),
            replace="mmlane.transport.controller_side:start_after",
        ),
        Target(
            module="sglang.srt.managers.io_struct",
            name="sock_send",
            signature="(socket, obj, flags=)",
            replace="mmlane.transport.controller_side:sending_tensors",
            since="0.5.15",
        ),
        Target(
            module="sglang.srt.managers.scheduler_components.request_receiver",
            name="SchedulerRequestReceiver._finalize_shm_features",
            signature="(self, recv_reqs)",
            replace="mmlane.transport.scheduler_side:take_alone_before",
            since="0.5.19",
        ),
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler._process_and_broadcast_mm_inputs",
            signature="(self, raw_mm_inputs)",
            replace="mmlane.transport.processing:without_tensors",
        ),
        Target(
            module="sglang.srt.managers.scheduler_pp_mixin",
            name="SchedulerPPMixin._pp_send_pyobj_to_next_stage",
            signature="(self, data, async_send=)",
            replace="mmlane.transport.pipeline:without_features",
        ),
    ),
    relies_on=(
        f"{MM_UTILS}.wrap_shm_features",
        f"{MM_UTILS}._wrap_tensor_or_list",
        f"{MM_UTILS}._wrap_shm_or_inline",
        f"{MM_UTILS}._get_is_default_transport",
        "sglang.srt.managers.io_struct.MMInputsProcessError",
        "sglang.srt.managers.embed_types.PositionalEmbeds",
        "sglang.srt.managers.schedule_batch.MultimodalDataItem",
        "sglang.srt.managers.schedule_batch.MultimodalInputs.release_features",
        f"{MSGPACK}._is_shm_pointer_mm_data",
        f"{MSGPACK}._encode_shm_pointer_mm_data",
        f"{MSGPACK}._decode_shm_pointer_mm_data",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request",
        f"{CONTROLLER}.launch_dp_attention_schedulers",
        f"{CONTROLLER}.dispatching_with_trace",
        f"{CONTROLLER}.dispatch_batch_generate",
        f"{CONTROLLER}.dispatch_batch_embedding",
        f"{CONTROLLER}.dispatch_health_check",
        f"{CONTROLLER}.send_control_message",
        f"{CONTROLLER}.send_to_all_workers",
        f"{CONTROLLER}.init_dispatcher",
        f"{CONTROLLER}.round_robin_scheduler",
        f"{CONTROLLER}.total_requests_scheduler",
        f"{CONTROLLER}.total_tokens_scheduler",
        f"{CONTROLLER}.follow_bootstrap_room_scheduler",
        f"{CONTROLLER}.maybe_external_dp_rank_routing",
        "sglang.srt.managers.scheduler_input_blocker.SchedulerInputBlocker.handle",
        "sglang.srt.managers.scheduler.Scheduler.init_watch_dog_memory_saver_input_blocker",
        "sglang.srt.managers.scheduler.IdleSleeper",
        "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper",
        "sglang.srt.managers.scheduler.SenderWrapper.send_output",
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        *RECEIVING,
    ),
)
