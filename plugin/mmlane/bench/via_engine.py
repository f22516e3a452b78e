"""The engine's own transport, from its own functions. Runs in an engine's environment, on any release since 0.5.9.

Sending is what its tokenizer does for a request: `wrap_shm_features`, then the coding it uses on its sockets. For
`n` samples that happens `n` times. Receiving is the engine's own `recv_requests`, whole, in one process a rank:
rank 0 takes the request from a socket, the others get it over gloo, and whatever that release does to agree and to
turn pointers into tensors happens in there. The engine polls for requests; here it is called when there is one.

What stands in for the rest of the engine is the settings that these functions ask for, and a socket that holds the
one message. With one reader there is no broadcast and no barrier, as with `--tp 1`.
"""

from __future__ import annotations

import inspect
import itertools
import os
import pickle
import sys
from array import array
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import zmq
from sglang.srt import server_args
from sglang.srt.managers import io_struct, mm_utils, schedule_batch
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from mmlane.bench import contract
from mmlane.bench.case import Case
from mmlane.engine.requests import items

try:
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver as Receiver
except ImportError:  # before 0.5.13
    from sglang.srt.managers.scheduler import Scheduler as Receiver

_TIMEOUT = timedelta(seconds=120)
_SETTINGS = SimpleNamespace(
    skip_tokenizer_init=False,
    enable_dp_attention=False,
    enable_dp_attention_local_control_broadcast=False,
    language_only=False,
    encoder_transfer_backend="",
    enable_trace=False,
)


class Producer(contract.Producer):
    """A tokenizer's part."""

    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        self._rounds = itertools.count()
        self._socket = _Socket()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        _give_settings(_SETTINGS)

    def open(self, case: Case) -> str:
        self._readers = case.readers
        return str(self.scratch / f"gloo-{next(self._rounds)}")

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        self._send(_request(tensors))
        # The message itself is for rank 0; the others take its arrival as their turn to poll.
        return [self._socket.recv()] * self._readers

    def _send(self, request: Any) -> None:
        request = mm_utils.wrap_shm_features(request)
        if hasattr(io_struct, "sock_send"):
            request.wrap_pickle_fields()
            io_struct.sock_send(self._socket, request)
        else:
            self._socket.send_pyobj(request)

    def close(self) -> None:
        pass


class Reader(contract.Reader):
    """A scheduler's part, as one rank of as many as there are readers."""

    def open(self, address: str, rank: int, case: Case) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{address}", rank=rank, world_size=case.readers, timeout=_TIMEOUT
        )
        self._rank = rank
        self._socket = _Socket()
        self._receiver = _receiver(rank, case.readers, self._socket)

    def take(self, message: bytes) -> Sequence[Tensor]:
        if self._rank == 0:
            self._socket.send(message)
        (request,) = self._receiver.recv_requests()
        return [item.feature for item in items(request)]

    def close(self) -> None:
        dist.destroy_process_group()


class _Socket:
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


def _request(tensors: Sequence[Tensor]) -> Any:
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


def _receiver(rank: int, size: int, socket: _Socket) -> Any:
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
