"""The engine's own sending and receiving of requests, with just enough around them to run without an engine.

For benchmarks, in an engine's environment: each function knows how its release does it. What stands in for the
rest of the engine is the settings that these functions ask for, and a socket that holds the one message.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import zmq
from sglang.srt import server_args
from sglang.srt.managers import io_struct, mm_utils, schedule_batch
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

try:
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver as Receiver
except ImportError:  # before 0.5.13
    from sglang.srt.managers.scheduler import Scheduler as Receiver

_SETTINGS = SimpleNamespace(
    skip_tokenizer_init=False,
    enable_dp_attention=False,
    enable_dp_attention_local_control_broadcast=False,
    language_only=False,
    encoder_transfer_backend="",
    enable_trace=False,
)


def as_tokenizer() -> None:
    """Have the engine's functions take this process for a tokenizer of one node."""
    _give_settings(_SETTINGS)


def send(request: Any, socket: Socket) -> None:
    """What a tokenizer does with a request: features into shared memory, then the coding of its sockets."""
    request = mm_utils.wrap_shm_features(request)
    if hasattr(io_struct, "sock_send"):
        request.wrap_pickle_fields()
        io_struct.sock_send(socket, request)
    else:
        socket.send_pyobj(request)


class Socket:
    """A ZeroMQ socket as far as the engine uses one here, with the coding that pyzmq has."""

    def __init__(self) -> None:
        self._messages: list[bytes] = []

    def send(self, data: bytes, flags: int = 0) -> None:
        self._messages.append(data)

    def recv(self, flags: int = 0) -> bytes:
        if not self._messages:
            raise zmq.Again
        return self._messages.pop(0)

    def send_pyobj(self, obj: object, flags: int = 0, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
        self.send(pickle.dumps(obj, protocol), flags)

    def recv_pyobj(self, flags: int = 0) -> Any:
        return pickle.loads(self.recv(flags))


def request_with(tensors: Sequence[Tensor]) -> Any:
    """One request with an item a tensor, and nothing more in it than its release insists on."""
    image = schedule_batch.Modality.IMAGE
    made = [schedule_batch.MultimodalDataItem(modality=image, feature=tensor) for tensor in tensors]
    if hasattr(schedule_batch, "MultimodalProcessorOutput"):
        inputs: Any = schedule_batch.MultimodalProcessorOutput(mm_items=made)
    else:
        inputs = {"mm_items": made}
    known = {
        "rid": "0",
        "input_text": "",
        "input_ids": _INPUT_IDS,
        "mm_inputs": inputs,
        "sampling_params": _SAMPLING,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "stream": False,
    }
    return io_struct.TokenizedGenerateReqInput(**{**_REQUIRED, **known})


_INPUT_IDS = array("q", [0])
_SAMPLING = SamplingParams()
_REQUIRED = {
    parameter.name: None
    for parameter in inspect.signature(io_struct.TokenizedGenerateReqInput).parameters.values()
    if parameter.default is parameter.empty
}


def _give_settings(settings: SimpleNamespace) -> None:
    """Answer what the functions called here ask of the engine's global arguments, in each release's manner."""
    mm_utils._is_default_tensor_transport = False  # one node
    server_args._global_server_args = settings
    for module in (mm_utils, sys.modules[Receiver.__module__]):
        for name in ("get_global_server_args", "get_server_args", "get_serving", "get_parallel", "get_disagg"):
            if hasattr(module, name):
                setattr(module, name, lambda: settings)


def receiver_for(rank: int, size: int, socket: Socket) -> Any:
    """The engine's receiver for one tensor-parallel group, with just what receiving looks at."""
    ranks = list(range(size))
    group = SimpleNamespace(rank=rank, ranks=ranks, rank_in_group=rank, cpu_group=dist.group.WORLD)
    parallel = {
        "pp_rank": 0,
        "tp_rank": rank,
        "tp_size": size,
        "tp_group": group,
        "attn_tp_rank": rank,
        "attn_tp_size": size,
        "attn_tp_group": group,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "attn_dp_rank": 0,
        "attn_dp_size": 1,
        "attn_dp_enabled": False,
    }
    settings = SimpleNamespace(**vars(_SETTINGS), **parallel)
    _give_settings(settings)
    attributes = {
        "recv_from_tokenizer": socket,
        "recv_from_rpc": socket,
        "recv_skipper": None,
        "input_blocker": None,
        "mm_receiver": None,
        "scripted_scheduler_hook": None,
        "scheduler_stage_metrics": None,
        "max_recv_per_poll": -1,
        "enable_trace": False,
        "server_args": settings,
        "model_config": SimpleNamespace(is_multimodal=True),
        "tp_cpu_group": group.cpu_group,
        "world_group": group,
        "ps": settings,
        **parallel,
    }
    receiver = Receiver.__new__(Receiver)
    declared = getattr(Receiver, "__dataclass_fields__", attributes)
    for name in declared.keys() & attributes.keys():
        object.__setattr__(receiver, name, attributes[name])  # a frozen dataclass on newer releases
    return receiver
