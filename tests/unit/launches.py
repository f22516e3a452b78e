"""What tests of the transport have in the engine's place: its arguments, and its module with our pointer class."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmlane.transport.base import Here
from mmlane.transport.chain import Chain
from mmlane.transport.pointer import ShmPointerMMData, slot

RUNTIME = "sglang.srt.runtime_context"
DP_ATTENTION = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
WHOLE = {
    "device": "cpu",
    "dp_size": 1,
    "tp_size": 1,
    "pp_size": 1,
    "nnodes": 1,
    "enable_dp_attention": False,
    "elastic_ep_backend": None,
    "skip_tokenizer_init": False,
    "tokenizer_worker_num": 1,
    "enable_metrics": False,
}


def launched(**options: Any) -> Any:
    """The engine's arguments, as far as the code under test reads them."""
    return SimpleNamespace(**{**WHOLE, **options})


def context(monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    """The engine's module that tells what it has made of the arguments."""
    module = ModuleType(RUNTIME)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, RUNTIME, module)


def engine_takes_pointers(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    """The engine's own conditions in its module, as in a launch on one node, with or without a tokenizer."""
    mm_utils = sys.modules[ShmPointerMMData.__module__]
    monkeypatch.setattr(mm_utils, "_get_is_default_transport", lambda: False, raising=False)
    serving = SimpleNamespace(skip_tokenizer_init=not answer)
    monkeypatch.setattr(mm_utils, "get_serving", lambda: serving, raising=False)


def without_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's module, where pickle looks for the class, and a process that has no lane."""
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", ShmPointerMMData.__module__):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[ShmPointerMMData.__module__])["ShmPointerMMData"] = ShmPointerMMData
    engine_takes_pointers(monkeypatch, True)
    monkeypatch.setattr(slot, "scheduler", None)
    monkeypatch.setattr(slot, "chain", Chain(Here()))
