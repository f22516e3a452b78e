"""`ipc_redirect` and `ipc_pool_budget`: what they compute. What the engine makes of it is in tests/engine."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from mmlane_patches import ipc_redirect
from mmlane_patches.ipc_pool_budget import MIB, _workers, share


@pytest.mark.parametrize(
    ("total", "workers", "each"),
    [(1024, 1, 1024), (1024, 2, 512), (1024, 8, 128), (1024, 16, 128), (100, 1, 100), (100, 4, 100), (0, 2, 0)],
)
def test_share(total: int, workers: int, each: int) -> None:
    assert share(total * MIB, workers) == each * MIB


def test_a_processor_outside_of_any_engine_is_one_worker() -> None:
    def not_published() -> Any:
        raise ValueError("Global server args is not set yet!")

    assert _workers(not_published) == 1
    assert _workers(lambda: SimpleNamespace(tokenizer_worker_num=3)) == 3


HANDLE = (0, b"handle", 4096, 0, b"counter", 0, b"event", True)
UNPOOLED = {"handle": HANDLE, "device_index": 0, "shape": (2, 3)}
POOLED = {"pool_handle": HANDLE, "pool_device_index": 0, "shape": (2, 3)}


@pytest.mark.parametrize(
    ("extra", "redirected"),
    [
        (UNPOOLED, {**UNPOOLED, "handle": (3, *HANDLE[1:]), "device_index": 3}),
        (POOLED, {**POOLED, "pool_handle": (3, *HANDLE[1:]), "pool_device_index": 3}),
        ({"another": "form"}, {"another": "form"}),
    ],
)
def test_a_copy_is_redirected(
    extra: dict[str, Any], redirected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ipc_redirect._reach, (3, 0), True)
    before = copy.deepcopy(extra)
    assert ipc_redirect.redirected(extra, 3) == redirected
    assert extra == before
    assert ipc_redirect.redirected(extra, 0) is extra


def test_nothing_is_redirected_to_where_it_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ipc_redirect._reach, (3, 0), False)
    assert ipc_redirect.redirected(UNPOOLED, 3) is UNPOOLED
