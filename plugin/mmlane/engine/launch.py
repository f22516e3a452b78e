"""How an engine was launched, as far as the way of its features depends on it."""

from __future__ import annotations

import os
import sys
from typing import Any

from mmlane.engine.topology import has_local_control, nodes_of_a_stage


def on_cuda(server_args: Any) -> bool:
    """Whether the engine's models run on CUDA. From 0.5.19 on only the context knows, unless the user said so."""
    import torch

    device = server_args.device
    if device is None:
        context: Any = sys.modules.get("sglang.srt.runtime_context")
        device = context.get_device().device
    return str(device).startswith("cuda") and torch.version.hip is None  # which torch calls cuda, too


def is_elastic(server_args: Any) -> bool:
    """Whether ranks may come later, from elsewhere (--elastic-ep-backend of every release, not of every fork)."""
    return bool(getattr(server_args, "elastic_ep_backend", None))


def without_lane(server_args: Any) -> str:
    """Why an engine launched like this goes without a lane; "" when nothing is in the way."""
    if is_elastic(server_args):
        return "--elastic-ep-backend, where ranks may come later"
    if nodes_of_a_stage(server_args) > 1:
        if _inputs_stay_pickled():
            return "SGLANG_USE_PICKLE_IPC=0 on several nodes below 0.5.19, where ranks alone open a request"
        if has_local_control(server_args):
            return "--enable-dp-attention-local-control-broadcast on several nodes"
    return ""


def _inputs_stay_pickled() -> bool:
    """Whether a request's inputs are bytes until ranks have them (0.5.15 - 0.5.18, without pickle IPC)."""
    io_struct: Any = sys.modules.get("sglang.srt.managers.io_struct")
    request = getattr(io_struct, "TokenizedGenerateReqInput", None)
    return speaks_msgpack() and "PickleWrapper" in str(getattr(request, "__annotations__", {}).get("mm_inputs"))


def is_multimodal(manager: Any) -> bool:
    """Whether a tokenizer manager serves a model that takes images; every release tells."""
    return bool(getattr(manager.model_config, "is_multimodal", True))


def engine_takes_pointers() -> bool:
    """Whether the engine makes pointers in this launch, agrees on segments, and takes them.

    It does not over several nodes, nor with --skip-tokenizer-init. Asked in a tokenizer, of the engine's own
    conditions in `mm_utils.wrap_shm_features`.
    """
    mm_utils: Any = sys.modules["sglang.srt.managers.mm_utils"]
    if mm_utils._get_is_default_transport():
        return False
    # 0.5.9, 0.5.16 and 0.5.17 on
    names = ("get_global_server_args", "get_server_args", "get_serving")
    asked = next(found for name in reversed(names) if (found := getattr(mm_utils, name, None)) is not None)
    return not asked().skip_tokenizer_init


def speaks_msgpack() -> bool:
    """Whether the engine's processes send each other messages of types, instead of pickles (from 0.5.15 on)."""
    environ: Any = sys.modules.get("sglang.srt.environ")
    by_pickle = getattr(getattr(environ, "envs", None), "SGLANG_USE_PICKLE_IPC", None)
    return by_pickle is not None and not by_pickle.get()


def rust_server() -> bool:
    """Whether the engine's Rust server stands in the tokenizer's place."""
    return os.environ.get("SGLANG_RUST_SERVER", "0").lower() not in ("", "0", "false")
