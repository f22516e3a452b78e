"""The engine's own receive function in four real processes on real gloo groups, one of them held up. A test runs:

    PYTHON_OF_AN_ENGINE receive_ranks.py {attn,tp,tp-without-agreement}...

The model cannot run on a CPU with DP-attention, but receiving can. Rank 0 gets a request from a real ZeroMQ socket
and broadcasts it; rank 3 is held in the middle of unpickling it until rank 0 has come out of `recv_requests`, or
until HOLD_S have passed, which is what happens when rank 0 rightly waits for it. Four ranks, because gloo
broadcasts along a tree: rank 0 waits for its children 1 and 2 when it next broadcasts, and only rank 2 for rank 3.
Prints one JSON object: for each scenario and rank "ok", or what it got instead.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from datetime import timedelta
from multiprocessing.synchronize import Event
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import zmq

HOLD_S = 5.0
TIMEOUT = timedelta(seconds=60)  # of a collective; only a fault takes that long
RANKS = range(4)
HELD = 3
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
FEATURE = torch.arange(300_000, dtype=torch.float32)

_rank = -1
_released: Event | None = None


def _hold() -> Hold:
    """Runs while a request is unpickled: the held rank waits here. Rank 0 pickles the result for the others."""
    if _rank == HELD and _released is not None:
        _released.wait(HOLD_S)
    return Hold()


class Hold:
    """Travels in a request, ahead of its features."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_hold, ())


def make_request() -> Any:
    """A request with one tensor, wrapped as the tokenizer does; what is not said is None."""
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    item = MultimodalDataItem(modality=Modality.IMAGE, feature=FEATURE.clone())
    try:
        from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

        mm_inputs: Any = MultimodalProcessorOutput(mm_items=[item])
    except ImportError:
        mm_inputs = {"mm_items": [item]}
    parameters = inspect.signature(TokenizedGenerateReqInput).parameters.values()
    required = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    # The text comes before the inputs in every release, and so is unpickled before them.
    request = TokenizedGenerateReqInput(**{**required, "input_text": Hold(), "mm_inputs": mm_inputs})
    return mm_utils.wrap_shm_features(request)


def serve_settings(groups: str) -> None:
    """What the engine asks of its global arguments on the way of a request, on each release in its own manner."""
    from sglang.srt import server_args
    from sglang.srt.managers import mm_utils, scheduler

    mm_utils._is_default_tensor_transport = False
    server_args._global_server_args = settings(groups)
    modules = [
        mm_utils,
        scheduler,
        sys.modules.get(f"{scheduler.__package__}.scheduler_components.request_receiver"),
    ]
    for module in filter(None, modules):
        for name in ("get_global_server_args", "get_server_args", "get_serving", "get_parallel", "get_disagg"):
            if hasattr(module, name):
                setattr(module, name, functools.partial(settings, groups))
        if hasattr(module, "is_ep_scale_joiner"):
            module.is_ep_scale_joiner = bool  # False


def settings(groups: str) -> Any:
    return SimpleNamespace(
        skip_tokenizer_init=False,
        enable_dp_attention=groups == "attn",
        enable_dp_attention_local_control_broadcast=False,
        language_only=False,
        encoder_transfer_backend="",
        enable_trace=False,
    )


def make_receiver(rank: int, groups: str, socket: Any) -> Any:
    """The engine's receiver with four ranks: one TP group, or one attention-TP group inside DP-attention."""
    group = dist.new_group(list(RANKS), backend="gloo")
    alone = [dist.new_group([r], backend="gloo") for r in RANKS][rank]
    all_ranks = SimpleNamespace(rank=rank, ranks=list(RANKS), rank_in_group=rank, cpu_group=group)
    parallel = {
        "pp_rank": 0,
        "tp_rank": rank,
        "tp_size": len(RANKS),
        "attn_tp_rank": rank,
        "attn_tp_size": len(RANKS),
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "attn_dp_rank": 0,
        "attn_dp_size": 1,
    }
    attributes = {
        "recv_from_tokenizer": socket,
        "recv_from_rpc": socket,
        "recv_skipper": None,
        "input_blocker": None,
        "mm_receiver": None,
        "scripted_scheduler_hook": None,
        "max_recv_per_poll": -1,
        "enable_trace": False,
        "server_args": settings(groups),
        "model_config": SimpleNamespace(is_multimodal=True),
        "tp_group": all_ranks,
        "tp_cpu_group": group,
        "attn_tp_group": all_ranks,
        "attn_tp_cpu_group": group,
        "attn_cp_group": SimpleNamespace(rank=rank, ranks=[rank], cpu_group=alone),
        "attn_cp_cpu_group": alone,
        "world_group": all_ranks,
        "ps": SimpleNamespace(**parallel),
        **parallel,
    }
    try:
        from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver as Receiver
    except ImportError:
        from sglang.srt.managers.scheduler import Scheduler as Receiver
    receiver = Receiver.__new__(Receiver)
    declared = getattr(Receiver, "__dataclass_fields__", attributes)
    for name, value in attributes.items():
        if name in declared:
            object.__setattr__(receiver, name, value)  # a frozen dataclass on some releases
    return receiver


def run_rank(rank: int, groups: str, agreement: bool, directory: str, released: Event, results: Any) -> None:
    global _rank, _released
    _rank, _released = rank, released
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=len(RANKS), timeout=TIMEOUT
        )
        serve_settings(groups)
        if not agreement:
            without_agreement()
        socket = zmq.Context.instance().socket(zmq.PULL)
        if rank == 0:
            socket.connect(f"ipc://{directory}/requests")
        receiver = make_receiver(rank, groups, socket)
        requests: list[Any] = []
        while not requests:
            requests = receiver.recv_requests()
        mm_inputs = requests[0].mm_inputs
        items = mm_inputs["mm_items"] if isinstance(mm_inputs, dict) else mm_inputs.mm_items
        received = len(items) == 1 and torch.equal(items[0].feature, FEATURE)
        results.put((rank, "ok" if received else type(mm_inputs).__name__))
    except BaseException as error:  # noqa: BLE001 - it is what this rank has to report
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        if rank == 0:
            released.set()


def without_agreement() -> None:
    """Take the collective out of our own patch, as a test of what it is there for."""
    dist.all_reduce = lambda *args, **kwargs: None


def scenario(groups: str, agreement: bool) -> dict[str, str]:
    """What each rank got when its requests came over these groups."""
    serve_settings(groups)
    fork = multiprocessing.get_context("fork")
    released, results = fork.Event(), fork.Queue()
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            fork.Process(target=run_rank, args=(rank, groups, agreement, directory, released, results))
            for rank in RANKS
        ]
        for process in ranks:
            process.start()
        with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
            sender.bind(f"ipc://{directory}/requests")
            sender.send_pyobj(make_request())  # as the engine itself does with SGLANG_USE_PICKLE_IPC
            found = dict(results.get(timeout=60) for _ in ranks)
        for process in ranks:
            process.join(30)
            process.kill()
    return {str(rank): result for rank, result in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="+", choices=("attn", "tp", "tp-without-agreement"))
    chosen = parser.parse_args().scenarios
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["SGLANG_USE_PICKLE_IPC"] = "1"  # read when the engine is imported
    # The engine is imported once, before any rank is forked: that is most of the time that this takes.
    print(json.dumps({name: scenario(name.partition("-")[0], "without" not in name) for name in chosen}))


if __name__ == "__main__":
    main()
