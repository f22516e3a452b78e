"""The engine's own receive function in four real processes on real gloo groups, one of them held up. A test runs:

    PYTHON_OF_AN_ENGINE receive_ranks.py {attn,tp,tp-without-agreement,lane-attn,lane-tp}...

The model cannot run on a CPU with DP-attention, but receiving can. Rank 0 gets a request from a real ZeroMQ socket
and broadcasts it; rank 3 is held in the middle of unpickling it until rank 0 has come out of `recv_requests`, or
is in a barrier or an all-reduce with rank 3, which it leaves only after rank 3 has come there. Four ranks, because
gloo broadcasts along a tree: rank 0 waits for its children 1 and 2 when it next broadcasts, and only rank 2 for 3.
Prints one JSON object: for each scenario and rank "ok", or what it got instead.

With a lane no rank is held. The ranks join it when they hear of it. Then come `by_lane`, `mixed`, `tampered` and
`overflow`, and each rank tells what became of each request of these, and for which barriers and all-reduces it
waited.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.synchronize import Event
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import zmq

TIMEOUT = timedelta(seconds=60)  # of a collective; only a fault takes that long
RANKS = range(4)
HELD = 3
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
FEATURE = torch.arange(300_000, dtype=torch.float32)

_rank = -1
_released: Event | None = None


def _hold() -> Hold:
    """Runs while a request is unpickled: the held rank waits here. Rank 0 pickles the result for the others."""
    if _rank == HELD and _released is not None and not _released.wait(TIMEOUT.seconds):
        raise TimeoutError("rank 0 neither waits for this rank nor comes out")
    return Hold()


class Hold:
    """Travels in a request, ahead of its features."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_hold, ())


def make_request(rid: str = "", *items: dict[str, Any]) -> Any:
    """A request with one tensor, or these items, wrapped as the tokenizer does; what is not said is None."""
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    mm_items = [
        MultimodalDataItem(modality=Modality.IMAGE, **item) for item in items or [{"feature": FEATURE.clone()}]
    ]
    try:
        from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

        mm_inputs: Any = MultimodalProcessorOutput(mm_items=mm_items)
    except ImportError:
        mm_inputs = {"mm_items": mm_items}
    # The text comes before the inputs in every release, and so is unpickled before them.
    text = None if rid else Hold()
    request = TokenizedGenerateReqInput(
        **{**required(TokenizedGenerateReqInput), "input_text": text, "mm_inputs": mm_inputs}
    )
    request.rid = rid or None
    return mm_utils.wrap_shm_features(request)


def make_batch(*requests: Any) -> Any:
    """These in one message, so that they are received in one go."""
    from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput as Batch

    return Batch(**{**required(Batch), "batch": list(requests)})


def required(cls: type) -> dict[str, None]:
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}


def items_of(request: Any) -> list[Any]:
    found = request.mm_inputs
    items: list[Any] = found["mm_items"] if isinstance(found, dict) else getattr(found, "mm_items", [])
    return items


def serve_settings(groups: str, **parallel: Any) -> None:
    """What the engine asks of its global arguments on the way of a request, on each release in its own manner."""
    from sglang.srt import server_args
    from sglang.srt.distributed import communication_op
    from sglang.srt.managers import mm_utils, scheduler

    mm_utils._is_default_tensor_transport = False
    given = functools.partial(settings, groups, **parallel)
    server_args._global_server_args = given()
    modules: list[Any] = [
        mm_utils,
        scheduler,
        sys.modules.get(f"{scheduler.__package__}.scheduler_components.request_receiver"),
        sys.modules.get("sglang.srt.runtime_context"),
    ]
    names = ("global_server_args", "server_args", "serving", "parallel", "disagg", "exec")
    for module in filter(None, modules):
        for name in names:
            if hasattr(module, f"get_{name}"):
                setattr(module, f"get_{name}", given)
        if hasattr(module, "is_ep_scale_joiner"):
            module.is_ep_scale_joiner = bool  # False
    for name in ("attn_tp_group", "attn_cp_group"):
        if name in parallel:
            setattr(communication_op, f"get_{name}", functools.partial(parallel.get, name))


def settings(groups: str, **parallel: Any) -> Any:
    given = {
        "device": "cpu",
        "skip_tokenizer_init": False,
        "enable_dp_attention": groups == "attn",
        "attn_dp_enabled": groups == "attn",
        "enable_dp_attention_local_control_broadcast": False,
        "language_only": False,
        "encoder_transfer_backend": "",
        "enable_trace": False,
        "enable_metrics": False,
        "is_ep_scale_joiner": False,
        "moe": SimpleNamespace(is_ep_scale_joiner=False),
        "nnodes": 1,
        "pp_size": 1,
        "tp_size": len(RANKS),
        "dp_size": 1,
        "num_dp_ranks": 1,
        "attn_dp_size": 1,
    }
    return SimpleNamespace(**{**given, **parallel})


def make_receiver(rank: int, groups: str, socket: Any) -> Any:
    """The engine's receiver with four ranks: one TP group, or one attention-TP group inside DP-attention."""
    group = dist.new_group(list(RANKS), backend="gloo")
    alone = [dist.new_group([r], backend="gloo") for r in RANKS][rank]
    all_ranks = SimpleNamespace(
        rank=rank, ranks=list(RANKS), rank_in_group=rank, world_size=len(RANKS), cpu_group=group
    )
    itself = SimpleNamespace(rank=rank, ranks=[rank], rank_in_group=0, world_size=1, cpu_group=alone)
    group_objects = {
        "tp_group": all_ranks,
        "attn_tp_group": all_ranks,
        "attn_cp_group": itself,
        "world_group": all_ranks,
    }
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
        "enable_metrics": False,
        "server_args": settings(groups),
        "model_config": SimpleNamespace(is_multimodal=True),
        "scheduler_stage_metrics": None,
        "tp_cpu_group": group,
        "attn_tp_cpu_group": group,
        "attn_cp_cpu_group": alone,
        "ps": SimpleNamespace(**parallel),
        **group_objects,
        **parallel,
    }
    serve_settings(groups, **group_objects, **parallel)
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
        receive = begin(rank, groups, directory)
        if rank == 0:
            before_collectives(lambda _, ranks: released.set() if HELD in ranks else None)
        if not agreement:
            without_agreement()
        results.put((rank, judged(receive()[0])))
    except BaseException as error:  # noqa: BLE001 - it is what this rank has to report
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        if rank == 0:
            released.set()


def begin(rank: int, groups: str, directory: str) -> Callable[[], list[Any]]:
    """Make this process a rank: what it receives when it next receives anything."""
    end_with_the_parent()
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=len(RANKS), timeout=TIMEOUT
    )
    socket: Any = zmq.Context.instance().socket(zmq.PULL)
    if rank == 0:
        socket.connect(f"ipc://{directory}/requests")
    receiver = make_receiver(rank, groups, socket)

    def receive() -> list[Any]:
        requests: list[Any] = []
        while not requests:
            requests = receiver.recv_requests()
        return requests

    return receive


def end_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def judged(request: Any) -> str:
    """Whether each value in a request is the feature; else what it has got instead of inputs."""
    found: list[Any] = []
    for item in items_of(request):
        for value in (item.feature, getattr(item, "precomputed_embeddings", None)):
            found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    found = [getattr(value, "proxy_state", {"tensor_data": value})["tensor_data"] for value in found]
    right = found and all(isinstance(value, torch.Tensor) and torch.equal(value, FEATURE) for value in found)
    return "ok" if right else type(request.mm_inputs).__name__


def without_agreement() -> None:
    """Take the collective out of our own patch, as a test of what it is there for."""
    dist.all_reduce = lambda *args, **kwargs: None


def scenario(groups: str, agreement: bool) -> dict[str, str]:
    """What each rank got when its requests came over these groups."""
    with running(groups, run_rank, agreement) as (send, hear, _):
        send(make_request())
        heard: dict[str, str] = hear()
        return heard


@contextmanager
def running(groups: str, function: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Any, Event]]:
    """Four ranks: how to send them a request, how to hear a result of each, and an event they share."""
    serve_settings(groups)
    fork = multiprocessing.get_context("fork")
    shared, results = fork.Event(), fork.Queue()
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            fork.Process(target=function, args=(rank, groups, *arguments, directory, shared, results))
            for rank in RANKS
        ]
        for process in ranks:
            process.start()
        try:
            with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
                sender.bind(f"ipc://{directory}/requests")

                def hear() -> dict[str, Any]:
                    found = dict(results.get(timeout=60) for _ in ranks)
                    return {str(rank): result for rank, result in sorted(found.items())}

                # The engine itself pickles with SGLANG_USE_PICKLE_IPC.
                yield sender.send_pyobj, hear, shared
            for process in ranks:
                process.join(30)
        finally:
            for process in ranks:
                process.kill()


# --- by lane ------------------------------------------------------------------------------------------------


def lane_scenario(groups: str) -> dict[str, Any]:
    """What became of each case: in each rank, and of the lane's tickets."""
    with running(groups, run_lane_rank) as (send, hear, over):
        from mmlane.transport.base import Tokenizer
        from mmlane.transport.pointer import slot
        from mmlane.transport.tokenizer_side import TokenizerSide

        side = TokenizerSide(  # here: nothing will be forked any more
            Tokenizer({"dp0": len(RANKS)}, 64 << 20, engine_class=slot.chain.here.engine_class)
        )
        producer = side.producer
        assert producer is not None
        try:
            found: dict[str, Any] = {}
            with sent_by(side.chain):
                send(make_request("opening"))
            found["opening"] = {"ranks": hear()}
            assert producer.lane is not None
            found["opening"]["is_open"] = producer.lane.wait_open(60)
            for case in (by_lane, mixed, tampered, overflow):
                before = producer.lane.stats().puts
                with sent_by(side.chain):
                    send(case())
                ranks = hear()
                tickets = settled(producer.lane, LEFT.get(case.__name__, 0))
                puts = producer.lane.stats().puts - before
                found[case.__name__] = {"ranks": ranks, "puts": puts, "tickets": tickets}
            over.set()
            return found
        finally:
            if producer.lane is not None:
                producer.lane.close()


@contextmanager
def sent_by(chain: Any) -> Iterator[None]:
    """What is made in here goes by this chain, as while the manager that has it sends a request."""
    from mmlane.transport.pointer import slot
    from mmlane.transport.tokenizer_side import Sending

    token = slot.scope.set(Sending(chain))
    try:
        yield
    finally:
        slot.scope.reset(token)


# Tickets that are never released, from this case on: that of which a bit was changed.
LEFT = {"tampered": 1, "overflow": 1}


def settled(lane: Any, left: int) -> int:
    """The tickets that are out once no more than `left` are, or after a minute; ranks release some in a thread."""
    until = time.monotonic() + TIMEOUT.seconds
    while (tickets := int(lane.stats().tickets)) > left and time.monotonic() < until:
        time.sleep(0.005)
    return tickets


def full(rid: str) -> Any:
    """A request with four values, in every place where a feature can be."""
    return make_request(
        rid,
        {"feature": FEATURE.clone()},
        {"feature": [FEATURE.clone(), FEATURE.clone()]},
        {"precomputed_embeddings": FEATURE.clone()},
    )


def by_lane() -> Any:
    return full("whole")


def mixed() -> Any:
    """One by lane, one by segment."""
    from mmlane.transport.pointer import slot

    whole = full("lane")
    with sent_by(slot.chain):  # that of a process without a lane
        segments = full("segment")
    return make_batch(whole, segments)


def tampered() -> Any:
    """Of two requests, one has a ticket with a bit that is wrong."""
    bad = full("tampered")
    payload = items_of(bad)[0].feature.payload
    ticket = bytearray(payload.ticket)
    ticket[19] ^= 1  # of its offset
    payload.ticket = bytes(ticket)
    return make_batch(bad, full("whole"))


def overflow() -> Any:
    """With CUDA IPC: what found room in the pool is a proxy, the rest has been copied back to the CPU."""
    from sglang.srt.managers.mm_utils import CudaIpcTensorTransportProxy

    proxy: Any = CudaIpcTensorTransportProxy.__new__(CudaIpcTensorTransportProxy)  # to make one takes a GPU
    proxy.proxy_state = {"ipc_extra": None, "tensor_data": FEATURE.clone()}
    return make_request(
        "overflow",
        {"feature": proxy},
        {"feature": FEATURE.clone()},
        {"feature": [FEATURE.clone()]},
        {"precomputed_embeddings": FEATURE.clone()},
    )


def run_lane_rank(rank: int, groups: str, directory: str, over: Event, results: Any) -> None:
    try:
        receive = begin(rank, groups, directory)
        from mmlane.engine.topology import RankPlace
        from mmlane.transport import scheduler_side

        scheduler_side.start(None, settings(groups), RankPlace(None, 0, rank), capacity=None, pinned=1 << 30)
        waits = counted_collectives()
        for _ in ("opening", by_lane, mixed, tampered, overflow):
            waits.clear()
            requests = receive()
            found: dict[str, Any] = {
                single.rid: judged(single)
                for request in requests
                for single in getattr(request, "batch", [request])
            }
            del requests
            gc.collect()
            results.put((rank, {**found, "waits": list(waits)}))
    except BaseException as error:  # noqa: BLE001 - it is what this rank has to report
        results.put((rank, f"{type(error).__name__}: {error}"))
    over.wait(60)  # leaving earlier would cut off a peer in the middle of its collective


def counted_collectives() -> list[str]:
    """The names of the collectives that are called from now on, for which a rank waits."""
    called: list[str] = []
    before_collectives(lambda name, _: called.append(name))
    return called


def before_collectives(tell: Callable[[str, list[int]], None]) -> None:
    """Be told of each barrier and all-reduce from now on, and of the ranks that it waits for, before it begins."""
    from sglang.srt.managers import scheduler

    def telling(collective: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(collective)

        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            assert not given.get("async_op"), "it would be waited for elsewhere"
            tell(collective.__name__, dist.get_process_group_ranks(given.get("group")))
            return collective(*args, **kwargs)

        return call

    modules = [dist, scheduler, sys.modules.get(f"{scheduler.__package__}.scheduler_components.request_receiver")]
    for name in ("barrier", "all_reduce"):
        replacement = telling(getattr(dist, name))
        for module in modules:
            if hasattr(module, name):
                setattr(module, name, replacement)


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "attn": lambda: scenario("attn", True),
    "tp": lambda: scenario("tp", True),
    "tp-without-agreement": lambda: scenario("tp", False),
    "lane-attn": lambda: lane_scenario("attn"),
    "lane-tp": lambda: lane_scenario("tp"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    chosen = parser.parse_args().scenarios
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["SGLANG_USE_PICKLE_IPC"] = "1"  # read when the engine is imported
    # The engine is imported once, before any rank is forked: that is most of the time that this takes.
    print(json.dumps({name: SCENARIOS[name]() for name in chosen}))


if __name__ == "__main__":
    main()
