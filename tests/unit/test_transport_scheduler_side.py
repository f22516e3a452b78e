"""How a rank takes what it receives: one look at a batch, and what is lost to one rank, on real gloo groups.

So do `deferred_unwrap`, `tp_barrier` and `shm_pointer` take. The engine's own receiving functions run in
tests/engine; here stand ones of a few lines, shaped like those of each range of versions.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from packaging.version import Version  # noqa: E402

from mmlane.engine.requests import places  # noqa: E402
from mmlane.engine.topology import carrying_groups  # noqa: E402
from mmlane.lane import StaleTicket  # noqa: E402
from mmlane.patching import Refusal, apply  # noqa: E402
from mmlane.transport import agreement, inline, processing, scheduler_side  # noqa: E402
from mmlane.transport.agreement import RefusedInputs, arrivals, refuse_lost  # noqa: E402
from mmlane.transport.base import Here, LostFeature, Scheduler  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.lane import Ticket  # noqa: E402
from mmlane.transport.pointer import ShmPointerMMData, slot  # noqa: E402
from mmlane.transport.rank import Rank  # noqa: E402
from mmlane.transport.scheduler_side import SchedulerSide  # noqa: E402
from mmlane_patches import shm_pointer, tp_barrier  # noqa: E402
from tests.forkserver import FORKED  # noqa: E402

SHM = Path("/dev/shm")
MM_UTILS = ShmPointerMMData.__module__
SCHEDULER = "sglang.srt.managers.scheduler"
dist: Any = torch.distributed


def engine_modules() -> dict[str, ModuleType]:
    """The engine's module, where pickle looks for the class, and those that it is in."""
    found = {name: ModuleType(name) for name in ("sglang", "sglang.srt", "sglang.srt.managers", MM_UTILS)}
    vars(found[MM_UTILS])["ShmPointerMMData"] = ShmPointerMMData
    return found


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the engine that wants no lane, and has received nothing yet."""
    for name, module in engine_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(slot, "scheduler", None)
    monkeypatch.setattr(slot, "chain", Chain(Here()))


def request(*values: Any, rid: str = "r", field: str = "feature", as_dict: bool = False) -> Any:
    items = [SimpleNamespace(feature=None, precomputed_embeddings=None) for _ in values]
    for item, value in zip(items, values, strict=True):
        setattr(item, field, value)
    return SimpleNamespace(rid=rid, mm_inputs={"mm_items": items} if as_dict else SimpleNamespace(mm_items=items))


def batch(*requests: Any) -> Any:
    return SimpleNamespace(batch=list(requests))


def features(value: Any) -> list[Any]:
    return [item.feature for item in value.mm_inputs.mm_items]


# --- in one process, without groups -------------------------------------------------------------------------


def received(tensor: Any) -> Any:
    return pickle.loads(pickle.dumps(ShmPointerMMData(tensor)))


def lost(tensor: Any) -> Any:
    value = ShmPointerMMData(tensor)
    (SHM / value.payload.name).unlink()
    return pickle.loads(pickle.dumps(value))


def receiver(*groups: Any) -> Any:
    """What receives requests, with the groups that carried them: TP, or those of attention."""
    if len(groups) < 2:
        sizes = SimpleNamespace(tp_size=1 + len(groups))
        return SimpleNamespace(
            server_args=SimpleNamespace(enable_dp_attention=False), ps=sizes, tp_cpu_group=next(iter(groups), None)
        )
    return SimpleNamespace(
        server_args=SimpleNamespace(enable_dp_attention=True),
        ps=SimpleNamespace(attn_tp_size=2, attn_cp_size=2),
        attn_tp_cpu_group=groups[0],
        attn_cp_cpu_group=groups[1],
    )


def take(requests: list[Any], *groups: Any) -> None:
    """Take what has been received by these groups, as a rank does; what is lost is refused."""
    scheduler_side.take_before(lambda self, recv_reqs: None)(receiver(*groups), requests)


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
@pytest.mark.parametrize("field", ["feature", "precomputed_embeddings"])
def test_lists_tuples_and_embeddings_are_taken(field: str, as_dict: bool) -> None:
    one, other = torch.ones(2), torch.zeros(3)
    plain = torch.full((1,), 5.0)
    req = request(received(one), [received(one), plain], (received(other),), "x", field=field, as_dict=as_dict)
    take([req])
    items = req.mm_inputs["mm_items"] if as_dict else req.mm_inputs.mm_items
    first, second, third, fourth = (getattr(item, field) for item in items)
    assert torch.equal(first, one) and fourth == "x"
    assert isinstance(second, list) and torch.equal(second[0], one) and second[1] is plain
    assert isinstance(third, tuple) and torch.equal(third[0], other)


def test_a_lost_segment_is_its_own_requests_loss_alone(caplog: pytest.LogCaptureFixture) -> None:
    beside = received(torch.zeros(2))
    bad = request(lost(torch.ones(1)), [beside], rid="bad")
    good = request(received(torch.ones(2)), rid="good")
    requests = [bad, good, SimpleNamespace(rid="control")]
    take(requests)
    assert isinstance(bad.mm_inputs, RefusedInputs)
    assert not (SHM / beside.payload.name).exists()
    assert "bad" in caplog.text and "FileNotFoundError" in caplog.text
    assert torch.equal(features(good)[0], torch.ones(2))


def test_a_lost_request_leaves_its_batch() -> None:
    good, bad, alone = request(received(torch.ones(1))), request(lost(torch.ones(1))), request(lost(torch.ones(1)))
    mixed, empty, text = batch(good, bad), batch(alone), SimpleNamespace(rid="text")
    requests = [mixed, empty, text]
    take(requests)
    assert requests == [mixed, bad, alone, text] and mixed.batch == [good]
    assert torch.equal(features(good)[0], torch.ones(1))


def test_the_marker_looks_like_no_inputs_and_travels_on() -> None:
    marker = RefusedInputs("why")
    assert not marker and list(marker.mm_items) == []
    assert pickle.loads(pickle.dumps(marker)) == marker
    assert arrivals([SimpleNamespace(mm_inputs=marker)]) == []


def test_a_request_that_lost_its_features_is_answered_with_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    io_struct = ModuleType("sglang.srt.managers.io_struct")
    vars(io_struct)["AbortReq"] = SimpleNamespace
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, io_struct.__name__, io_struct)
    handled: list[Any] = []

    def handle_generate_request(self: Any, recv_req: Any) -> None:
        handled.append(recv_req)

    handle = refuse_lost(handle_generate_request)
    answer = handle(None, SimpleNamespace(rid="r", mm_inputs=RefusedInputs("why")))
    assert answer.rid == "r" and not handled
    assert answer.finished_reason["type"] == "abort" and answer.finished_reason["message"] == "why"
    assert answer.finished_reason["status_code"] is HTTPStatus.INTERNAL_SERVER_ERROR
    whole = SimpleNamespace(rid="s", mm_inputs=None)
    assert handle(None, whole) is None and handled == [whole]


def test_on_0_5_9_a_refused_request_has_a_number_of_prompt_tokens() -> None:
    (target,) = (t for t in shm_pointer.SPEC.targets if t.name.endswith("_handle_abort_req"))
    state = SimpleNamespace(out_list=[])
    manager = SimpleNamespace(rid_to_state={"r": state})

    def original(self: Any, recv_obj: Any) -> None:
        if recv_obj.rid in self.rid_to_state:
            self.rid_to_state[recv_obj.rid].out_list.append({"meta_info": {"id": recv_obj.rid}})

    handle = target.build(original)
    handle(manager, SimpleNamespace(rid="r"))
    handle(manager, SimpleNamespace(rid="HEALTH_CHECK"))
    assert state.out_list == [{"meta_info": {"id": "r", "prompt_tokens": 0}}]


# --- the seams ----------------------------------------------------------------------------------------------


@pytest.fixture
def engine_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    def make(name: str, source: str) -> ModuleType:
        module = ModuleType(name)
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


# What a scheduler imports of `mm_utils`, with our functions in their place.
NATIVE = """
from mmlane.transport.pointer import ShmPointerMMData
calls = []
def has_shm_features(recv_reqs):
    calls.append("has")
    return True
def unwrap_shm_features(obj):
    calls.append("unwrap")
    for item in obj.mm_inputs.mm_items:
        if isinstance(item.feature, ShmPointerMMData):
            item.feature = item.feature.materialize()
    return obj
"""

BASE = """
from types import SimpleNamespace
class Scheduler:
    server_args = SimpleNamespace(enable_dp_attention=False)
    tp_size = 1
    tp_cpu_group = None
    def __init__(self, queue=()):
        self.queue = list(queue)
"""

UP_TO_0_5_9 = """
    def recv_requests(self):
        return [unwrap_shm_features(request) for request in self.queue]
"""

UP_TO_0_5_12 = """
    def recv_requests(self):
        if has_shm_features(self.queue):
            calls.append("barrier")
        for request in self.queue:
            unwrap_shm_features(request)
        return self.queue
"""

FAILING = """
    def recv_requests(self):
        raise ValueError("engine")
"""

BY_THEIR_MODULE = """
    def recv_requests(self):
        from sglang.srt.managers import mm_utils
        for request in self.queue:
            mm_utils.unwrap_shm_features(request)
        return self.queue
"""


@pytest.fixture
def scheduler(engine_module: Callable[[str, str], ModuleType]) -> Callable[..., Any]:
    """Makes the engine's modules with a `recv_requests`, and ours around it; gives `mm_utils` and the class."""

    def make(recv_requests: str, *, names: str = "calls, has_shm_features, unwrap_shm_features") -> Any:
        mm_utils = engine_module(MM_UTILS, NATIVE)
        there = vars(mm_utils)
        there["unwrap_shm_features"] = scheduler_side.unwrap_nothing_while_receiving(there["unwrap_shm_features"])
        there["has_shm_features"] = scheduler_side.has_nothing_while_receiving(there["has_shm_features"])
        vars(sys.modules["sglang.srt.managers"])["mm_utils"] = mm_utils
        imports = f"from {MM_UTILS} import {names}\n"
        made = vars(engine_module(SCHEDULER, imports + BASE + recv_requests))["Scheduler"]
        made.recv_requests = scheduler_side.take_after(made.recv_requests)
        return mm_utils, made

    return make


@pytest.mark.parametrize("recv_requests", [UP_TO_0_5_9, UP_TO_0_5_12], ids=["0.5.9", "0.5.10 - 0.5.12"])
def test_up_to_0_5_12_the_original_neither_waits_nor_takes(
    scheduler: Callable[..., Any], recv_requests: str
) -> None:
    mm_utils, made = scheduler(recv_requests)
    req = request(received(torch.ones(2)))
    assert made([req]).recv_requests() == [req]
    assert torch.equal(features(req)[0], torch.ones(2))
    assert mm_utils.calls == []  # no barrier, and it looks for pointers in no request
    assert mm_utils.has_shm_features([]) is True  # as before


@pytest.mark.parametrize("recv_requests", [UP_TO_0_5_9, UP_TO_0_5_12], ids=["0.5.9", "0.5.10 - 0.5.12"])
def test_pointers_of_a_class_that_has_replaced_ours_since_are_the_engines(
    scheduler: Callable[..., Any], recv_requests: str
) -> None:
    mm_utils, made = scheduler(recv_requests)
    mm_utils.ShmPointerMMData = type("ShmPointerMMData", (), {})
    made([request(torch.ones(1)), request(torch.ones(2))]).recv_requests()
    assert mm_utils.calls == ["has", "unwrap", "unwrap"]


def test_what_was_lost_is_refused_up_to_0_5_12(scheduler: Callable[..., Any]) -> None:
    _, made = scheduler(UP_TO_0_5_12)
    good, bad = request(received(torch.ones(2))), request(lost(torch.ones(1)))
    assert made([good, bad]).recv_requests() == [good, bad]
    assert torch.equal(features(good)[0], torch.ones(2)) and isinstance(bad.mm_inputs, RefusedInputs)


def test_nothing_received_is_nothing_to_take(scheduler: Callable[..., Any]) -> None:
    mm_utils, made = scheduler("\n    def recv_requests(self):\n        return self.queue and None\n")
    assert made().recv_requests() == [] and made([1]).recv_requests() is None
    assert mm_utils.calls == []


def test_the_functions_work_again_after_an_error(scheduler: Callable[..., Any]) -> None:
    mm_utils, made = scheduler(FAILING)
    with pytest.raises(ValueError, match="engine"):
        made().recv_requests()
    other = request(received(torch.ones(2)))
    assert torch.equal(features(mm_utils.unwrap_shm_features(other))[0], torch.ones(2))
    assert mm_utils.has_shm_features([]) is True
    assert mm_utils.calls == ["unwrap", "has"]


def test_on_0_5_9_unwrapping_waits_for_the_end_of_receiving(scheduler: Callable[..., Any]) -> None:
    seen: list[bool] = []
    mm_utils, made = scheduler(UP_TO_0_5_9.replace("self.queue]", "self.queue if look(request)]"))

    def look(req: Any) -> bool:
        seen.append(isinstance(features(mm_utils.unwrap_shm_features(req))[0], ShmPointerMMData))
        return True

    vars(sys.modules[SCHEDULER])["look"] = look
    req = request(received(torch.ones(2)))
    made([req]).recv_requests()
    assert seen == [True] and torch.equal(features(req)[0], torch.ones(2))
    other = request(received(torch.ones(2)))
    assert torch.equal(features(mm_utils.unwrap_shm_features(other))[0], torch.ones(2))


def test_a_scheduler_class_of_another_module_receives_as_well(scheduler: Callable[..., Any]) -> None:
    """As in a program that brings a scheduler of its own, made from the engine's."""
    _, made = scheduler(UP_TO_0_5_12)
    own = type("OwnScheduler", (made,), {"__module__": __name__})
    req = request(received(torch.ones(2)))
    assert own([req]).recv_requests() == [req]
    assert torch.equal(features(req)[0], torch.ones(2))


def test_a_scheduler_may_call_the_functions_by_their_own_module(scheduler: Callable[..., Any]) -> None:
    """Then its module has no such names; those that we replace are there all the same."""
    _, made = scheduler(BY_THEIR_MODULE, names="calls")
    req = request(received(torch.ones(2)))
    assert made([req]).recv_requests() == [req]
    assert torch.equal(features(req)[0], torch.ones(2))


# The engine waits and takes where it finds a pointer; the later form leaves at once where it finds none.
FINALIZE = """
from mmlane.transport.pointer import ShmPointerMMData
calls = []
def has_shm_features(reqs):
    return any(isinstance(i.feature, ShmPointerMMData) for r in reqs if r.mm_inputs for i in r.mm_inputs.mm_items)
def up_to_0_5_18(self, reqs):
    if has_shm_features(reqs or []): calls.append("barrier")
    for r in reqs or []: calls.append("unwrap")
def isolating(self, reqs):
    if not has_shm_features(reqs or []): return
    calls.append("barrier")
"""


@pytest.mark.parametrize(("form", "calls"), [("up_to_0_5_18", ["unwrap", "unwrap"]), ("isolating", [])])
def test_from_0_5_13_the_original_finds_nothing_left_to_do(
    engine_module: Callable[[str, str], ModuleType], form: str, calls: list[str]
) -> None:
    """Also where a development version has the later form already under the same signature."""
    module = engine_module("sample_receiver", FINALIZE)
    finalize = scheduler_side.take_before(vars(module)[form])
    good, bad = request(received(torch.ones(2))), request(lost(torch.ones(2)))
    finalize(receiver(), [good, bad])
    assert vars(module)["calls"] == calls and isinstance(bad.mm_inputs, RefusedInputs)
    assert torch.equal(features(good)[0], torch.ones(2))
    finalize(receiver(), None)


@pytest.mark.parametrize("name", ["has_shm_features", "unwrap_shm_features"])
def test_an_engine_without_the_names_is_refused(
    engine_module: Callable[[str, str], ModuleType], name: str
) -> None:
    """Then `recv_requests` is not replaced either: a patch is applied whole."""
    (target,) = (t for t in tp_barrier.SPEC.targets_on(Version("0.5.12")) if t.name == name)
    assert target.module == MM_UTILS
    module = engine_module(MM_UTILS, "")
    with pytest.raises(Refusal, match=f"wanted {MM_UTILS}.{name}, found no {name}"):
        apply(target, module)


@pytest.mark.parametrize(
    ("dp_attention", "sizes", "wanted"),
    [
        (False, (4, 2, 2), ["tp"]),
        (False, (1, 1, 1), []),
        (True, (4, 2, 2), ["attn_tp", "attn_cp"]),
        (True, (4, 2, 1), ["attn_tp"]),
        (True, (4, 1, 1), []),
    ],
)
def test_the_groups_that_carried_the_work(
    dp_attention: bool, sizes: tuple[int, int, int], wanted: list[str]
) -> None:
    size = dict(zip(("tp_size", "attn_tp_size", "attn_cp_size"), sizes, strict=True))
    common = {
        "server_args": SimpleNamespace(enable_dp_attention=dp_attention),
        **{f"{group}_cpu_group": group for group in ("tp", "attn_tp", "attn_cp")},
    }
    assert carrying_groups(SimpleNamespace(**common, **size)) == wanted
    assert carrying_groups(SimpleNamespace(**common, ps=SimpleNamespace(**size))) == wanted


# --- one look at a batch ------------------------------------------------------------------------------------


class Counting:
    """A request that counts how often its inputs are looked at."""

    def __init__(self, held: Any, rid: str) -> None:
        self.held = held
        self.rid = rid
        self.looks = 0

    @property
    def mm_inputs(self) -> Any:
        self.looks += 1
        return self.held

    @mm_inputs.setter
    def mm_inputs(self, value: Any) -> None:
        self.held = value


def counting(*values: Any, rid: str, field: str = "feature") -> Counting:
    return Counting(request(*values, field=field).mm_inputs, rid)


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Any]:
    """Makes pointers that arrive with tickets, in a rank that can take all of them but the stale one."""

    def taken(rank: Rank, ticket: bytes) -> Any:
        if ticket == b"stale":
            raise StaleTicket("stale")
        return torch.full((3,), float(ticket))

    monkeypatch.setattr(Rank, "take", taken)
    monkeypatch.setattr(Rank, "release", lambda rank, ticket, sent=False: None)
    scheduler_side._become(SchedulerSide(Chain(Scheduler("dp0", 0))))

    def arrive(ticket: bytes) -> Any:
        pointer = ShmPointerMMData.__new__(ShmPointerMMData)
        pointer.__setstate__({"payload": "ticket", "ticket": ticket, "shape": (3,), "dtype": torch.float32})
        assert isinstance(pointer.payload, Ticket)
        return pointer

    return arrive


@pytest.mark.parametrize("with_losses", [False, True], ids=["all arrive", "some are lost"])
@pytest.mark.parametrize("how", ["by the side", "before the engine", "segments are left to the engine"])
def test_a_batch_is_looked_at_once(tickets: Callable[[bytes], Any], how: str, with_losses: bool) -> None:
    """Whatever it holds: tickets, segments, both in one request, tensors, text, and batches of those."""
    large = torch.ones(inline.SMALL + 1)  # what is smaller has no segment where there is a lane
    texts = [Counting(None, "text"), Counting({}, "empty")]
    tensors = counting(large, rid="tensors")
    by_segment = counting(received(large), [received(large)], rid="segments")
    by_ticket = counting(tickets(b"1"), (tickets(b"2"), tickets(b"3")), rid="tickets")
    mixed = counting(tickets(b"4"), received(large), rid="mixed")
    embeddings = counting(received(large), rid="embeddings", field="precomputed_embeddings")
    bad = []
    if with_losses:
        bad += [counting(received(large), tickets(b"stale"), rid="no ticket")]
        bad += [counting(lost(large), tickets(b"5"), rid="no segment")]
    requests = [texts[0], tensors, by_ticket, batch(texts[1], by_segment, mixed), embeddings, *bad]
    engines = how == "segments are left to the engine"
    if how == "before the engine":
        take(requests)
    else:
        refused = scheduler_side.side().take(requests, None if engines else list)
        assert [req for req, _ in refused] == (bad[:1] if engines else bad)
    whole = [by_segment, by_ticket, mixed, embeddings]
    everything = [*texts, tensors, *whole, *bad]
    assert {each.rid: each.looks for each in everything} == {each.rid: 1 for each in everything}

    assert [isinstance(each.held, RefusedInputs) for each in bad] == [how == "before the engine"] * len(bad)
    one, others = features(by_ticket)
    assert one.tolist() == [1] * 3 and isinstance(others, tuple)
    assert [other.tolist() for other in others] == [[2] * 3, [3] * 3]
    assert features(mixed)[0].tolist() == [4] * 3
    left = arrivals(whole)
    assert {arrival.request.rid for arrival in left} == ({"segments", "mixed", "embeddings"} if engines else set())
    for arrival in [*left, *arrivals(bad)]:
        arrival.release()


TEXTS = [
    SimpleNamespace(rid="no inputs", mm_inputs=None),
    SimpleNamespace(rid="control"),
    SimpleNamespace(rid="0.5.9", mm_inputs={}),
    SimpleNamespace(rid="0.5.9, no items", mm_inputs={"mm_items": []}),
    SimpleNamespace(rid="no items", mm_inputs=SimpleNamespace(mm_items=[])),
    SimpleNamespace(rid="still pickled", mm_inputs=b"bytes"),
    SimpleNamespace(rid="refused", mm_inputs=RefusedInputs("why")),
    "a word",
]


def test_text_only_requests_make_no_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """No object is made for them, the rank waits for no other rank, and they are not changed."""

    def none(*arguments: Any) -> Any:
        raise AssertionError("made for text")

    monkeypatch.setattr(agreement, "Arrival", none)
    monkeypatch.setattr(agreement, "Place", none)
    monkeypatch.setattr(scheduler_side, "agree", none)
    requests = [*TEXTS, batch(*TEXTS), batch()]
    before = list(requests)
    assert arrivals(requests) == []
    assert SchedulerSide(Chain(Here())).take(requests, none) == []
    take(requests, "a group")
    assert requests == before


def test_a_rank_takes_tensors_and_text_without_waiting_for_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> Any:
        raise AssertionError("waited for others")

    plain = request(torch.ones(1), [torch.ones(2)])
    assert SchedulerSide(Chain(Here())).take([plain, *TEXTS], none) == []
    assert arrivals([plain]) == []


# --- on real groups -----------------------------------------------------------------------------------------


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, events, *arguments)` returns on each rank of a gloo world; there is an event a rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    events = [FORKED.Event() for _ in range(world)]
    queue = FORKED.Queue()
    ranks = [
        FORKED.Process(target=_rank, args=(rank, world, store.port, events, queue, function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        answers = dict(queue.get(timeout=120) for _ in ranks)
        store.set("all done", "")
    finally:
        for process in ranks:
            process.join(60)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, events: Any, queue: Any, function: Any, arguments: Any) -> None:
    sys.modules.update(engine_modules())
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        try:
            answer = function(rank, events, *arguments)
        except Exception:  # noqa: BLE001 - shown by the test that compares the answers
            answer = traceback.format_exc()
        queue.put((rank, answer))
        store.wait(["all done"])  # leaving earlier would cut off a peer in the middle of its collective
    finally:
        dist.destroy_process_group()


def broadcast(rank: int, group: Any, value: Any, opened: Callable[[], None]) -> Any:
    """As the engine does it: the source goes on with its own object; the others unpickle after `opened()`."""
    if rank == 0:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([data.numel()]), src=0, group=group)
        dist.broadcast(data, src=0, group=group)
        return value
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, src=0, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=group)
    opened()
    return pickle.loads(bytes(data.tolist()))


def _delayed_rank(rank: int, events: Any, message: bytes, with_agreement: bool) -> str:
    """Rank 1 opens late: when rank 0 has taken, or with the agreement, when rank 0 waits in the collective."""
    group = dist.group.WORLD
    original = dist.all_reduce

    def all_reduce(*arguments: Any, **options: Any) -> Any:
        if rank == 0:
            events[0].set()
        return original(*arguments, **options)

    dist.all_reduce = all_reduce
    requests = pickle.loads(message) if rank == 0 else None
    requests = broadcast(rank, group, requests, lambda: events[0].wait(60) and None)
    try:
        if with_agreement:
            take(requests, group)
        else:
            for item in requests[0].mm_inputs.mm_items:
                item.feature = item.feature.materialize()
    except LostFeature as error:
        return type(error).__name__
    finally:
        events[0].set()
    return str(float(features(requests[0])[0].sum()))


@pytest.mark.parametrize(("with_agreement", "second"), [(False, "LostFeature"), (True, "8.0")])
def test_a_rank_that_opens_late(with_agreement: bool, second: str) -> None:
    """Without the barrier the first rank unlinks too early, for certain; with it, never."""
    message = pickle.dumps([request(ShmPointerMMData(torch.ones(8)))])
    assert run_ranks(2, _delayed_rank, message, with_agreement) == ["8.0", second]


def _agreeing(rank: int, events: Any, message: bytes, blind: int) -> list[str]:
    group = dist.group.WORLD
    requests = broadcast(rank, group, pickle.loads(message) if rank == 0 else None, lambda: None)
    if rank == blind:  # this rank alone cannot read the first request
        first = features(requests[0])[0].payload
        first.release = lambda: None
        first.error = "OSError: too many open files"
    take(requests, group)
    return [type(r.mm_inputs).__name__ for r in requests]


@pytest.mark.parametrize("blind", [0, 2])
def test_all_ranks_drop_what_one_cannot_read(blind: int) -> None:
    values: Any = [ShmPointerMMData(torch.ones(1)), ShmPointerMMData(torch.zeros(2))]
    message = pickle.dumps([request(values[0], rid="a"), request(values[1], rid="b")])
    assert run_ranks(3, _agreeing, message, blind) == [["RefusedInputs", "SimpleNamespace"]] * 3
    assert not any((SHM / value.payload.name).exists() for value in values)


def _dp_attention(rank: int, events: Any, messages: list[bytes]) -> list[str]:
    """Two DP groups of 2 x 1 ranks, with different requests; only the first has a loss, on its second rank."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    requests = pickle.loads(messages[rank // 2])
    if rank == 1:
        features(requests[0])[0].payload.error = "made to fail"
    take(requests, halves[rank // 2])
    return [type(r.mm_inputs).__name__ for r in requests]


def test_each_dp_group_agrees_for_itself() -> None:
    messages = [
        pickle.dumps([request(ShmPointerMMData(torch.ones(1))), request(ShmPointerMMData(torch.ones(1)))]),
        pickle.dumps([SimpleNamespace(rid="text", mm_inputs=None)]),
    ]
    lossy, fine = ["RefusedInputs", "SimpleNamespace"], ["NoneType"]
    assert run_ranks(4, _dp_attention, messages) == [lossy, lossy, fine, fine]


def _two_groups(rank: int, events: Any, message: bytes) -> str:
    """Attention TP x CP of 2 x 2: rank 3 alone has the loss, and shares no group with rank 0."""
    rows, columns = (
        [dist.new_group([0, 1]), dist.new_group([2, 3])],
        [dist.new_group([0, 2]), dist.new_group([1, 3])],
    )
    requests = pickle.loads(message)
    if rank == 3:
        features(requests[0])[0].payload.error = "made to fail"
    take(requests, rows[rank // 2], columns[rank % 2])
    return type(requests[0].mm_inputs).__name__


def test_a_loss_reaches_all_of_tp_and_cp() -> None:
    message = pickle.dumps([request(ShmPointerMMData(torch.ones(1)))])
    assert run_ranks(4, _two_groups, message) == ["RefusedInputs"] * 4


def test_pointers_of_a_hook_that_replaces_the_class_everywhere_are_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's hooks replace a name in every module that has the object: others' pointers are not ours."""
    theirs = type("Theirs", (), {"materialize": None})
    for name, module in list(sys.modules.items()):
        if name.startswith(("mmlane", "sglang")):
            for key, value in list(vars(module).items()):
                if value is slot.pointers:
                    monkeypatch.setattr(module, key, theirs)
    pointer = theirs()
    other, own = (
        request(pointer),
        request(slot.pointers.of(torch.ones(2), inline.Inline(torch.ones(2)), b"x", None)),
    )
    take([other, own])
    assert features(other) == [pointer] and torch.equal(features(own)[0], torch.ones(2))


# --- tensors beside the feature, and who makes them ready ---------------------------------------------------


@pytest.mark.parametrize("little", [True, False])
def test_what_the_engine_keeps_is_a_copy_but_for_embeddings_where_little_is_kept(
    little: bool, tickets: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps embeddings and auxiliary tensors until a request has ended; their room in the lane is wanted."""
    monkeypatch.setattr(Rank, "holds_little", lambda rank, ticket: little)
    req = request(tickets(b"1"), tickets(b"2"))
    first, second = req.mm_inputs.mm_items
    first.precomputed_embeddings = tickets(b"3")
    second.model_specific_data = {"crops": tickets(b"4"), "parts": [tickets(b"5"), [tickets(b"6")]], "sizes": [1]}
    req.positional_embed_overrides = SimpleNamespace(embeds=tickets(b"7"), positions=[0])
    pointers = [pointer for place in places(req) for pointer in place.values()]
    take([req])
    data, overrides = second.model_specific_data, req.positional_embed_overrides
    taken = [first.feature, second.feature, first.precomputed_embeddings, data["crops"]]
    taken += [data["parts"][0], data["parts"][1][0], overrides.embeds]
    assert [tensor.tolist() for tensor in taken] == [[float(number)] * 3 for number in range(1, 8)]
    assert data["sizes"] == [1]
    lent = {id(pointer.payload.peek()) for pointer in pointers}
    assert [id(tensor) in lent for tensor in taken] == [True] * 2 + [little] + [False] * 4


def test_a_request_that_loses_an_auxiliary_tensor_is_refused(tickets: Callable[[bytes], Any]) -> None:
    req = request(tickets(b"1"))
    req.mm_inputs.mm_items[0].model_specific_data = {"crops": tickets(b"stale")}
    take([req])
    assert isinstance(req.mm_inputs, RefusedInputs)


def test_nothing_is_left_of_a_lost_override(tickets: Callable[[bytes], Any]) -> None:
    """The engine computes with the overrides of a request that it has given up, too."""
    req = SimpleNamespace(rid="r", mm_inputs=None)
    req.positional_embed_overrides = SimpleNamespace(embeds=tickets(b"stale"), positions=[0])
    take([req])
    assert isinstance(req.mm_inputs, RefusedInputs) and req.positional_embed_overrides is None


class Item:
    """One of the engine's, as far as the function that makes inputs ready is concerned."""

    def __init__(self, feature: Any, valid: bool = True, **auxiliary: Any) -> None:
        self.feature, self.precomputed_embeddings, self.model_specific_data = feature, None, auxiliary
        self.pad_value: Any = None
        self.valid = valid

    def set_pad_value(self) -> None:
        if isinstance(self.feature, str):
            raise TypeError("cannot be hashed")
        if self.pad_value is None:
            self.pad_value = float(self.feature.sum())

    def is_valid(self) -> bool:
        return self.valid


class Maker:
    """A scheduler that makes inputs ready as the engine does; `sent` is what its first rank has pickled to it."""

    def __init__(self, rank: int, sent: bytes = b"") -> None:
        self.dp_tp_group = SimpleNamespace(rank_in_group=rank)
        self.sent = sent

    def process(self, raw_mm_inputs: Any) -> Any:
        if self.dp_tp_group.rank_in_group:
            return pickle.loads(self.sent)
        there = [item for item in raw_mm_inputs.mm_items if item.is_valid()]
        for item in there:
            item.set_pad_value()
        self.sent = pickle.dumps(SimpleNamespace(mm_items=there))
        return SimpleNamespace(mm_items=there)


def raw_inputs() -> Any:
    large = torch.arange(float(inline.SMALL))
    auxiliary = {"crops": large + 2, "parts": [large + 3], "sizes": [1], "grid": torch.ones(3)}
    return SimpleNamespace(mm_items=[Item(large), Item(large, valid=False), Item(large + 1, **auxiliary)])


def test_the_first_rank_makes_inputs_ready_for_all_and_each_has_its_own_tensors() -> None:
    make = processing.without_tensors(Maker.process)
    first, raw = Maker(0), raw_inputs()
    processed = [make(first, raw), make(Maker(1, first.sent), own := raw_inputs())]
    assert len(first.sent) < 10_000
    for inputs, mine in zip(processed, (raw, own), strict=True):
        one, other = inputs.mm_items
        assert one.feature is mine.mm_items[0].feature and other.feature is mine.mm_items[2].feature
        data, kept = other.model_specific_data, mine.mm_items[2].model_specific_data
        assert data["crops"] is kept["crops"] and data["parts"] is kept["parts"] and data["sizes"] == [1]
        assert torch.equal(data["grid"], torch.ones(3))
        assert (one.pad_value, other.pad_value) == (raw.mm_items[0].pad_value, raw.mm_items[2].pad_value)


def test_what_cannot_be_hashed_is_the_engines_to_tell() -> None:
    raw = SimpleNamespace(mm_items=[Item(torch.ones(inline.SMALL)), Item("text")])
    with pytest.raises(TypeError, match="cannot be hashed"):
        processing.without_tensors(Maker.process)(Maker(0), raw)
    assert raw.mm_items[0].feature is not None


def test_tensors_come_back_when_the_engine_fails() -> None:
    class Fails(Maker):
        def process(self, raw_mm_inputs: Any) -> Any:
            assert raw_mm_inputs.mm_items[0].feature is None
            raise OSError("mine")

    raw = raw_inputs()
    with pytest.raises(OSError, match="mine"):
        processing.without_tensors(Fails.process)(Fails(0), raw)
    assert all(item.feature is not None for item in raw.mm_items)


@pytest.mark.parametrize("raw", [None, {"mm_items": [1]}, SimpleNamespace(mm_items=[])], ids=str)
def test_other_inputs_are_processed_as_they_are(raw: Any) -> None:
    assert processing.without_tensors(lambda self, raw_mm_inputs: raw_mm_inputs)(None, raw) is raw


def test_nothing_of_this_process_is_left() -> None:
    assert list(SHM.glob(f"mmlane_{os.getpid()}_*")) == []
