"""`deferred_unwrap`, `tp_barrier` and the isolation of lost segments: on real gloo groups of processes.

The engine's own receiving functions run in tests/engine; here stand ones of a few lines, shaped like those of each
range of versions.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.patching import Refusal  # noqa: E402
from mmlane_patches import receiving, shm_pointer  # noqa: E402
from mmlane_patches.agreement import LostFeatures, agree, pointers, refuse_lost  # noqa: E402
from mmlane_patches.pointer import SegmentPointer  # noqa: E402
from mmlane_patches.wrapping import wrap_everything  # noqa: E402
from tests.forkserver import FORKED  # noqa: E402

SHM = Path("/dev/shm")
dist: Any = torch.distributed


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


def received(tensor: Any) -> SegmentPointer:
    copy: SegmentPointer = pickle.loads(pickle.dumps(SegmentPointer(tensor)))
    return copy


def lost(tensor: Any) -> SegmentPointer:
    value = SegmentPointer(tensor)
    (SHM / value.shm_name).unlink()
    copy: SegmentPointer = pickle.loads(pickle.dumps(value))
    return copy


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
@pytest.mark.parametrize("field", ["feature", "precomputed_embeddings"])
def test_lists_tuples_and_embeddings_are_taken(field: str, as_dict: bool) -> None:
    one, other = torch.ones(2), torch.zeros(3)
    plain = torch.full((1,), 5.0)
    req = request(received(one), [received(one), plain], (received(other),), "x", field=field, as_dict=as_dict)
    agree([], [req])
    receiving.take([req])
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
    agree([], requests)
    assert isinstance(bad.mm_inputs, LostFeatures)
    assert not (SHM / beside.shm_name).exists()
    assert "bad" in caplog.text and "FileNotFoundError" in caplog.text
    receiving.take(requests)
    assert torch.equal(features(good)[0], torch.ones(2))


def test_a_lost_one_leaves_its_batch() -> None:
    good, bad, alone = request(received(torch.ones(1))), request(lost(torch.ones(1))), request(lost(torch.ones(1)))
    mixed, empty, text = batch(good, bad), batch(alone), SimpleNamespace(rid="text")
    requests = [mixed, empty, text]
    agree([], requests)
    assert requests == [mixed, bad, alone, text] and mixed.batch == [good]
    receiving.take(requests)


def test_the_marker_looks_like_no_inputs_and_travels_on() -> None:
    marker = LostFeatures("why")
    assert not marker and list(marker.mm_items) == []
    assert pickle.loads(pickle.dumps(marker)) == marker
    assert pointers(SimpleNamespace(mm_inputs=marker)) == []


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
    answer = handle(None, SimpleNamespace(rid="r", mm_inputs=LostFeatures("why")))
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
def engine_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    def make(name: str, source: str) -> ModuleType:
        module = ModuleType(name)
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield make


NATIVE = """
calls = []
def has_shm_features(reqs): calls.append("has"); return True
def unwrap_shm_features(obj): calls.append("unwrap"); return obj
"""


def scheduler(**more: Any) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(enable_dp_attention=False), tp_size=1, tp_cpu_group=None, **more
    )


def test_up_to_0_5_12_the_original_neither_waits_nor_takes(
    engine_module: Callable[[str, str], ModuleType],
) -> None:
    module = engine_module(
        receiving.SCHEDULER,
        NATIVE + "def recv_requests(self):\n    has_shm_features(self.queue) and calls.append('barrier')\n"
        "    return [unwrap_shm_features(r) for r in self.queue]\n",
    )
    receive = receiving.agree_after(vars(module)["recv_requests"])
    req = request(received(torch.ones(2)))
    assert receive(scheduler(queue=[req])) == [req]
    assert torch.equal(features(req)[0], torch.ones(2))
    assert vars(module)["calls"] == ["unwrap"]  # no barrier; and once, at the end, for pointers that are not ours
    assert vars(module)["has_shm_features"]([]) is True  # back in place


def test_the_names_are_back_after_an_error(engine_module: Callable[[str, str], ModuleType]) -> None:
    module = engine_module(receiving.SCHEDULER, NATIVE + "def recv_requests(self): raise ValueError('engine')\n")
    before = dict(vars(module))
    with pytest.raises(ValueError, match="engine"):
        receiving.agree_after(vars(module)["recv_requests"])(scheduler())
    assert vars(module) == before


def test_on_0_5_9_unwrapping_waits_for_the_end_of_receiving() -> None:
    seen: list[bool] = []

    def native(obj: Any) -> Any:
        receiving.take([obj])
        return obj

    unwrap = receiving.deferrable(native)

    def recv_requests(self: Any) -> Any:
        for req in self.queue:
            seen.append(isinstance(features(unwrap(req))[0], SegmentPointer))
        return self.queue

    req = request(received(torch.ones(2)))
    receiving.agree_after_deferring(recv_requests)(scheduler(queue=[req]))
    assert seen == [True] and torch.equal(features(req)[0], torch.ones(2))
    other = request(received(torch.ones(2)))
    assert torch.equal(features(unwrap(other))[0], torch.ones(2))


# The engine waits and takes where it finds a pointer; the later form leaves at once where it finds none.
FINALIZE = """
from mmlane_patches.pointer import SegmentPointer
calls = []
def has_shm_features(reqs):
    return any(isinstance(i.feature, SegmentPointer) for r in reqs if r.mm_inputs for i in r.mm_inputs.mm_items)
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
    receiver = SimpleNamespace(
        server_args=SimpleNamespace(enable_dp_attention=False), ps=SimpleNamespace(tp_size=1), tp_cpu_group=None
    )
    finalize = receiving.agree_before(vars(module)[form])
    good, bad = request(received(torch.ones(2))), request(lost(torch.ones(2)))
    finalize(receiver, [good, bad])
    assert vars(module)["calls"] == calls and isinstance(bad.mm_inputs, LostFeatures)
    assert torch.equal(features(good)[0], torch.ones(2))
    finalize(receiver, None)


def test_a_scheduler_without_the_names_is_refused(engine_module: Callable[[str, str], ModuleType]) -> None:
    module = engine_module(receiving.SCHEDULER, "def recv_requests(self): return []\n")
    with pytest.raises(Refusal, match="wanted has_shm_features and unwrap_shm_features in sglang"):
        receiving.agree_after(vars(module)["recv_requests"])


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
    assert receiving.carrying_groups(SimpleNamespace(**common, **size)) == wanted
    assert receiving.carrying_groups(SimpleNamespace(**common, ps=SimpleNamespace(**size))) == wanted


# --- wrapping on 0.5.9 - 0.5.12 -----------------------------------------------------------------------------


def native_wrap(as_dict: bool, enabled: bool) -> Callable[[Any], Any]:
    def wrap_shm_features(obj: Any) -> Any:
        if enabled:
            for item in obj.mm_inputs.get("mm_items", []) if as_dict else obj.mm_inputs.mm_items:
                if isinstance(item.feature, torch.Tensor):
                    item.feature = SegmentPointer(item.feature)
        return obj

    return wrap_everything(wrap_shm_features)


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
@pytest.mark.parametrize("field", ["feature", "precomputed_embeddings"])
def test_lists_and_embeddings_go_by_pointer(field: str, as_dict: bool) -> None:
    tensor = torch.ones(2)
    req = request(tensor, [tensor, "x"], (tensor,), field=field, as_dict=as_dict)
    assert native_wrap(as_dict, True)(req) is req
    items = req.mm_inputs["mm_items"] if as_dict else req.mm_inputs.mm_items
    first, second, third = (getattr(item, field) for item in items)
    assert isinstance(first, SegmentPointer) and isinstance(third, tuple) and isinstance(third[0], SegmentPointer)
    assert isinstance(second[0], SegmentPointer) and second[1] == "x"


def test_the_engines_own_conditions_hold_for_them_too() -> None:
    tensor = torch.ones(2)
    req = request([tensor], field="precomputed_embeddings")
    native_wrap(False, False)(req)
    assert req.mm_inputs.mm_items[0].precomputed_embeddings == [tensor]


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
    if with_agreement:
        agree([group], requests)
    try:
        receiving.take(requests)
    except RuntimeError as error:
        return type(error).__name__
    finally:
        events[0].set()
    return str(float(features(requests[0])[0].sum()))


@pytest.mark.parametrize(("with_agreement", "second"), [(False, "LostSegment"), (True, "8.0")])
def test_a_rank_that_opens_late(with_agreement: bool, second: str) -> None:
    """Without the barrier the first rank unlinks too early, for certain; with it, never."""
    message = pickle.dumps([request(SegmentPointer(torch.ones(8)))])
    assert run_ranks(2, _delayed_rank, message, with_agreement) == ["8.0", second]


def _agreeing(rank: int, events: Any, message: bytes, blind: int) -> list[str]:
    group = dist.group.WORLD
    requests = broadcast(rank, group, pickle.loads(message) if rank == 0 else None, lambda: None)
    if rank == blind:  # this rank alone cannot read the first request
        first = features(requests[0])[0]
        first.close_and_unlink = lambda: None
        first._materialization_error = "OSError: too many open files"
    agree([group], requests)
    receiving.take(requests)
    return [type(r.mm_inputs).__name__ for r in requests]


@pytest.mark.parametrize("blind", [0, 2])
def test_all_ranks_drop_what_one_cannot_read(blind: int) -> None:
    values = [SegmentPointer(torch.ones(1)), SegmentPointer(torch.zeros(2))]
    message = pickle.dumps([request(values[0], rid="a"), request(values[1], rid="b")])
    assert run_ranks(3, _agreeing, message, blind) == [["LostFeatures", "SimpleNamespace"]] * 3
    assert not any((SHM / value.shm_name).exists() for value in values)


def _dp_attention(rank: int, events: Any, messages: list[bytes]) -> list[str]:
    """Two DP groups of 2 x 1 ranks, with different requests; only the first has a loss, on its second rank."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    requests = pickle.loads(messages[rank // 2])
    if rank == 1:
        features(requests[0])[0]._materialization_error = "made to fail"
    agree([halves[rank // 2]], requests)
    receiving.take(requests)
    return [type(r.mm_inputs).__name__ for r in requests]


def test_each_dp_group_agrees_for_itself() -> None:
    messages = [
        pickle.dumps([request(SegmentPointer(torch.ones(1))), request(SegmentPointer(torch.ones(1)))]),
        pickle.dumps([SimpleNamespace(rid="text", mm_inputs=None)]),
    ]
    lossy, fine = ["LostFeatures", "SimpleNamespace"], ["NoneType"]
    assert run_ranks(4, _dp_attention, messages) == [lossy, lossy, fine, fine]


def _two_groups(rank: int, events: Any, message: bytes) -> str:
    """Attention TP x CP of 2 x 2: rank 3 alone has the loss, and shares no group with rank 0."""
    rows, columns = (
        [dist.new_group([0, 1]), dist.new_group([2, 3])],
        [dist.new_group([0, 2]), dist.new_group([1, 3])],
    )
    requests = pickle.loads(message)
    if rank == 3:
        features(requests[0])[0]._materialization_error = "made to fail"
    agree([rows[rank // 2], columns[rank % 2]], requests)
    receiving.take(requests)
    return type(requests[0].mm_inputs).__name__


def test_a_loss_reaches_all_of_tp_and_cp() -> None:
    message = pickle.dumps([request(SegmentPointer(torch.ones(1)))])
    assert run_ranks(4, _two_groups, message) == ["LostFeatures"] * 4


def test_nothing_of_this_process_is_left() -> None:
    assert list(SHM.glob(f"mmlane_{os.getpid()}_*")) == []
