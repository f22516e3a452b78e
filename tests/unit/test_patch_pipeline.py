"""What a pipeline stage sends on: copies without what the next does not read, the originals untouched."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.transport.pipeline import without_features  # noqa: E402

FEATURE = torch.arange(10.0)


def item(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"feature": FEATURE, "precomputed_embeddings": None, "pad_value": 7, **values})


def request(*items: Any, as_dict: bool) -> SimpleNamespace:
    held = {"mm_items": list(items), "im_token_id": 5}
    return SimpleNamespace(rid="r", mm_inputs=held if as_dict else SimpleNamespace(**held))


def items_of(sent: Any) -> list[Any]:
    held = sent.mm_inputs
    found: list[Any] = held["mm_items"] if isinstance(held, dict) else held.mm_items
    return found


def send(data: Any, **options: Any) -> tuple[Any, Any]:
    def original(self: Any, data: Any, async_send: bool = False) -> tuple[Any, Any]:
        return data, async_send

    found: tuple[Any, Any] = without_features(original)(None, data, **options)
    return found


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("feature", [FEATURE, [FEATURE, FEATURE], (FEATURE,)])
def test_features_stay_behind(feature: Any, as_dict: bool) -> None:
    original = request(item(feature=feature), item(pad_value=None), as_dict=as_dict)
    before = copy.copy(items_of(original))
    (sent,), async_send = send([original], async_send=True)
    assert async_send is True
    light, whole = items_of(sent)
    assert (light.feature, light.pad_value) == (None, 7)
    assert whole.feature is FEATURE  # the next stage computes its pad value from it
    assert sent.rid == "r" and items_of(original) == before
    assert items_of(original)[0].feature is feature  # which this stage has yet to read


@pytest.mark.parametrize(
    "original",
    [
        SimpleNamespace(rid="r", mm_inputs=None),
        SimpleNamespace(rid="r"),
        request(item(feature=None), as_dict=False),
        request(item(feature=None, precomputed_embeddings=FEATURE), as_dict=False),
        request(item(feature=SimpleNamespace(handle=1)), as_dict=False),
        request(item(pad_value=None), as_dict=True),
        "rid",
    ],
)
def test_what_has_nothing_to_spare_is_sent_as_it_is(original: Any) -> None:
    (sent,), _ = send([original])
    assert sent is original


@pytest.mark.parametrize("data", [None, {"a": 1}, "text", ["rid", "other"]])
def test_what_are_no_requests_passes(data: Any) -> None:
    assert send(data) == (data, False)
