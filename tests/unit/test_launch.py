"""What of a launch decides on the way of its features: asked of the engine as each release answers it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.engine import launch  # noqa: E402
from tests.unit.launches import DP_ATTENTION, context, launched  # noqa: E402

WRAPPING = "sglang.srt.managers.mm_utils"


def test_what_is_in_the_way() -> None:
    assert "--elastic-ep-backend" in launch.without_lane(launched(elastic_ep_backend="mooncake"))


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
