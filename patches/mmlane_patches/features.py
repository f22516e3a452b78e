"""Where the multimodal features of the engine's requests are, on every version.

A request has `mm_inputs`: None, a dict with "mm_items" (0.5.9), or an object with `mm_items` (later). An item
has `feature` and `precomputed_embeddings`, each None, a value (tensor, pointer, ...) or a list or tuple of
values. A batch request has its requests in `batch`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

FIELDS = ("feature", "precomputed_embeddings")


def single_requests(requests: Iterable[Any]) -> Iterator[Any]:
    """The requests, with batches opened up."""
    for request in requests:
        batch = getattr(request, "batch", None)
        if isinstance(batch, list):
            yield from single_requests(batch)
        else:
            yield request


def items(request: Any) -> list[Any]:
    """The multimodal items of a single request; none where it has none, or where they are still pickled."""
    mm_inputs = getattr(request, "mm_inputs", None)
    found = mm_inputs.get("mm_items") if isinstance(mm_inputs, dict) else getattr(mm_inputs, "mm_items", None)
    return found if isinstance(found, list) else []


def values(request: Any) -> Iterator[Any]:
    """Every value in the items of a single request, lists and tuples opened up."""
    for item in items(request):
        for field in FIELDS:
            value = getattr(item, field, None)
            if isinstance(value, list | tuple):
                yield from value
            elif value is not None:
                yield value


def replace_values(request: Any, replacement: Callable[[Any], Any]) -> None:
    """Put `replacement(value)` in the place of every value, in the same kind of list or tuple."""
    for item in items(request):
        for field in FIELDS:
            value = getattr(item, field, None)
            if isinstance(value, list | tuple):
                setattr(item, field, type(value)(map(replacement, value)))
            elif value is not None:
                setattr(item, field, replacement(value))


def tokenized(send: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """What finds the request among the arguments of a `_send_one_request`; on 0.5.9 it is not the first."""
    position = list(inspect.signature(send).parameters).index("tokenized_obj")
    return lambda args, kwargs: args[position] if len(args) > position else kwargs["tokenized_obj"]
