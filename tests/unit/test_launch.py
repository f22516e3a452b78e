"""What of a launch decides on the way of its features: asked of the engine as each release answers it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")

from mmlane.engine import launch  # noqa: E402
from tests.unit.launches import DP_ATTENTION, context, launched  # noqa: E402

WRAPPING = "sglang.srt.managers.mm_utils"


class Environ:
    """The engine's, of which one variable matters here."""

    def __init__(self, *, by_pickle: bool) -> None:
        self.envs = SimpleNamespace(SGLANG_USE_PICKLE_IPC=SimpleNamespace(get=lambda: by_pickle))


class Wrapped:
    """A request of 0.5.15 - 0.5.18."""

    mm_inputs: PickleWrapper | None  # type: ignore[name-defined]  # noqa: F821


class Plain:
    """A request of any other release."""

    mm_inputs: object


def test_what_is_in_the_way() -> None:
    assert "--elastic-ep-backend" in launch.without_lane(launched(elastic_ep_backend="mooncake"))
    local = "enable_dp_attention_local_control_broadcast"
    for nodes, obstacle in ((1, ""), (2, "--enable-dp-attention-local-control-broadcast")):
        assert launch.without_lane(launched(**DP_ATTENTION, nnodes=nodes, **{local: False})) == ""
        found = launch.without_lane(launched(**DP_ATTENTION, nnodes=nodes, **{local: True}))
        assert found.startswith(obstacle) and bool(found) == bool(obstacle)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("by_pickle", [True, False])
@pytest.mark.parametrize("request_type", [Wrapped, Plain])
def test_inputs_that_only_ranks_open_are_in_the_way_of_the_gate(
    nodes: int, by_pickle: bool, request_type: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.environ", cast(ModuleType, Environ(by_pickle=by_pickle)))
    io_struct = cast(ModuleType, SimpleNamespace(TokenizedGenerateReqInput=request_type))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", io_struct)
    obstacle = launch.without_lane(launched(tp_size=2, nnodes=nodes))
    assert ("SGLANG_USE_PICKLE_IPC=0" in obstacle) == (nodes == 2 and not by_pickle and request_type is Wrapped)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_tokenizer_init": True},
        {"nnodes": 2, "tp_size": 4},
        {"nnodes": 2, "pp_size": 2},
        {"nnodes": 4, "pp_size": 2, "tp_size": 4},
        DP_ATTENTION,
        {**DP_ATTENTION, "nnodes": 2},
        {**DP_ATTENTION, "nnodes": 2, "dp_size": 1},
    ],
)
def test_nothing_is_in_the_way(options: dict[str, Any]) -> None:
    assert launch.without_lane(launched(**options)) == ""
    older = launched()
    del older.elastic_ep_backend  # which a fork may not have
    assert launch.without_lane(older) == ""


@pytest.mark.parametrize("by", ["get_global_server_args", "get_server_args", "get_serving"])
@pytest.mark.parametrize(
    ("inside", "skips", "takes"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_the_engine_is_asked_whether_it_takes_pointers(
    by: str, inside: bool, skips: bool, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapping = ModuleType(WRAPPING)
    vars(wrapping)["_get_is_default_transport"] = lambda: inside
    vars(wrapping)[by] = lambda: SimpleNamespace(skip_tokenizer_init=skips)
    monkeypatch.setitem(sys.modules, WRAPPING, wrapping)
    assert launch.engine_takes_pointers() is takes


CONTEXT = {"get_device": lambda: SimpleNamespace(device="cuda"), "get_parallel": lambda: None}


@pytest.mark.parametrize(
    ("device", "known", "on_cuda"),
    [("cuda", {}, True), ("cuda:0", {}, True), ("cpu", {}, False), (None, CONTEXT, True), ("cpu", CONTEXT, False)],
    ids=["cuda", "one cuda", "cpu", "0.5.19, not said", "0.5.19, said"],
)
def test_whether_the_engine_is_on_cuda(
    device: str | None, known: dict[str, Any], on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context(monkeypatch, **known)
    assert launch.on_cuda(launched(device=device)) is on_cuda


def test_what_torch_calls_cuda_is_not_always_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert not launch.on_cuda(launched(device="cuda"))


@pytest.mark.parametrize(
    ("value", "there"), [(None, False), ("", False), ("0", False), ("False", False), ("1", True), ("true", True)]
)
def test_whether_the_rust_server_is_there(value: str | None, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_RUST_SERVER", raising=False)
    if value is not None:
        monkeypatch.setenv("SGLANG_RUST_SERVER", value)
    assert launch.rust_server() is there


def test_a_model_is_taken_for_one_that_sees_unless_it_says_otherwise() -> None:
    for told, sees in (({}, True), ({"is_multimodal": True}, True), ({"is_multimodal": False}, False)):
        assert launch.is_multimodal(SimpleNamespace(model_config=SimpleNamespace(**told))) is sees
