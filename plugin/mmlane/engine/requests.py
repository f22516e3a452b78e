"""Where the multimodal features of the engine's requests are, on every version.

A request has `mm_inputs`: None, a dict with "mm_items" (0.5.9), or an object with `mm_items` (later). An item
has `feature` and `precomputed_embeddings`, each None, a value (tensor, pointer, ...) or a list or tuple of
values. A batch request has its requests in `batch`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

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
    if mm_inputs is None:
        return []
    found = mm_inputs.get("mm_items") if isinstance(mm_inputs, dict) else getattr(mm_inputs, "mm_items", None)
    return found if isinstance(found, list) else []


def places(request: Any) -> list[Place]:
    """Where a single request has values: once each, whatever number of values there is in a list."""
    there = items(request)
    if not there:  # most often: text
        return []
    return [Place(item, field) for item in there for field in FIELDS if getattr(item, field, None) is not None]


class Place(NamedTuple):
    """One field of one item, with a value or a list or tuple of values in it."""

    item: Any
    field: str

    def values(self) -> list[Any]:
        """What stands there now; lists and tuples opened up."""
        value = getattr(self.item, self.field)
        return list(value) if isinstance(value, list | tuple) else [value]

    def replace(self, replacement: Callable[[Any], Any]) -> None:
        """Put `replacement(value)` in the place of every value, in the same kind of list or tuple."""
        value = getattr(self.item, self.field)
        if isinstance(value, list | tuple):
            setattr(self.item, self.field, type(value)(map(replacement, value)))
        else:
            setattr(self.item, self.field, replacement(value))


def tokenized(send: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """What finds the request among the arguments of a `_send_one_request`; on 0.5.9 it is not the first."""
    position = list(inspect.signature(send).parameters).index("tokenized_obj")
    return lambda args, kwargs: args[position] if len(args) > position else kwargs["tokenized_obj"]
