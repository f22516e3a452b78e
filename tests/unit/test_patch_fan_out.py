"""`fan_out`: samples that are shallow copies of one request no longer share what is wrapped for sending."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from mmlane_patches.fan_out import SPEC

(TARGET,) = SPEC.targets


def patched(send: Callable[..., Any]) -> Any:
    """The engine's `_send_one_request` with this patch alone."""
    step = TARGET.load_step()
    assert step is not None
    return TARGET.build(send, (step,))


class Manager:
    """Sends as the engine does: wrapping turns the items of the request itself into pointers."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def old(self, obj: Any, tokenized_obj: Any, created_time: float | None = None) -> Any:
        return self.new(tokenized_obj)

    def new(self, tokenized_obj: Any) -> Any:
        mm_inputs = tokenized_obj.mm_inputs
        if mm_inputs:
            for item in mm_inputs["mm_items"] if isinstance(mm_inputs, dict) else mm_inputs.mm_items:
                item.feature = f"pointer to {item.feature}"
        self.sent.append(tokenized_obj)
        return "state"


def request(as_dict: bool) -> Any:
    items = [SimpleNamespace(feature="a"), SimpleNamespace(feature="b")]
    return SimpleNamespace(
        mm_inputs={"mm_items": items, "im_token_id": 1} if as_dict else SimpleNamespace(mm_items=items)
    )


def items(value: Any) -> list[Any]:
    found: list[Any] = (
        value.mm_inputs["mm_items"] if isinstance(value.mm_inputs, dict) else value.mm_inputs.mm_items
    )
    return found


def fan_out(send: Callable[[Any], Any], n: int, as_dict: bool) -> Any:
    """The engine's two sites: one request that warms the prefix, then n samples."""
    tokenized = request(as_dict)
    for _ in range(1 + n):
        send(copy.copy(tokenized))
    return tokenized


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
def test_without_the_patch_the_second_sends_a_pointer_to_a_pointer(as_dict: bool) -> None:
    manager = Manager()
    fan_out(manager.new, 2, as_dict)
    assert items(manager.sent[2])[0].feature == "pointer to pointer to pointer to a"


@pytest.mark.parametrize("as_dict", [True, False], ids=["0.5.9", "later"])
def test_each_sample_has_its_own(as_dict: bool) -> None:
    manager = Manager()
    send = patched(Manager.new)
    tokenized = fan_out(lambda sample: send(manager, sample), 3, as_dict)
    assert [[item.feature for item in items(sample)] for sample in manager.sent] == [
        ["pointer to a", "pointer to b"]
    ] * 4
    assert [item.feature for item in items(tokenized)] == ["a", "b"]
    if as_dict:
        assert manager.sent[0].mm_inputs["im_token_id"] == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda send, m, o, t: send(m, o, t, 1.0),
        lambda send, m, o, t: send(m, o, tokenized_obj=t),
        lambda send, m, o, t: send(m, obj=o, tokenized_obj=t, created_time=None),
    ],
)
def test_the_signature_of_0_5_9(call: Callable[..., Any]) -> None:
    manager, tokenized, first = Manager(), request(True), request(True)
    shared = items(tokenized)
    assert call(patched(Manager.old), manager, first, tokenized) == "state"
    assert items(tokenized) is not shared and items(first)[0].feature == "a"


@pytest.mark.parametrize(
    "value", [SimpleNamespace(), SimpleNamespace(mm_inputs=None), SimpleNamespace(mm_inputs={})]
)
def test_a_request_without_features(value: Any) -> None:
    before = dict(vars(value))
    patched(lambda self, tokenized_obj: None)(None, value)
    assert vars(value) == before
