"""Where the tensors of the engine's requests are, on every version.

A request has `mm_inputs`: None, a dict with "mm_items" (0.5.9), or an object with `mm_items` (later). Up to 0.5.14
those of an embedding request are called `image_inputs`. An item has `feature` and `precomputed_embeddings`, each
None, a value (tensor, pointer, ...) or a list or tuple of values; and `model_specific_data`, a dict in which
processors put everything else, its auxiliary data here. Each copy of an item shares that dict. From 0.5.11 on a
request may also have `positional_embed_overrides`, with a tensor `embeds`. What there is of all items together, as
many numbers as the prompt has tokens, stands in `mm_inputs` itself. A batch request has its requests in `batch`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

FIELDS = ("feature", "precomputed_embeddings")
EMBEDDING_INPUTS = "image_inputs"
AUXILIARY = "model_specific_data"
OVERRIDES = "positional_embed_overrides"
OF_ALL_ITEMS = ("mrope_positions", "token_type_ids", "vision_position_ids", "visible_frame_counts")


def single_requests(requests: Iterable[Any]) -> Iterator[Any]:
    """The requests, with batches opened up."""
    for request in requests:
        batch = batch_of(request)
        if batch is None:
            yield request
        else:
            yield from single_requests(batch)


def batch_of(request: Any) -> list[Any] | None:
    """The requests in a batch, as the list that it has; None for a single request, and for other messages."""
    batch = getattr(request, "batch", None)
    return batch if isinstance(batch, list) else None


def id_of(request: Any) -> str | None:
    """By what a request is known to the user; None where it has no such thing."""
    rid: str | None = getattr(request, "rid", None)
    return rid


def items(request: Any) -> list[Any]:
    """The multimodal items of a single request; none where it has none, or where they are still pickled."""
    return items_of(inputs_of(request))


def inputs_of(request: Any) -> Any:
    """The multimodal inputs of a request, or what `refuse` has put in their place; None where there is neither."""
    try:
        return request.mm_inputs
    except AttributeError:
        return getattr(request, EMBEDDING_INPUTS, None)


def items_of(mm_inputs: Any) -> list[Any]:
    """The items in a request's multimodal inputs."""
    if mm_inputs is None:
        return []
    found = mm_inputs.get("mm_items") if isinstance(mm_inputs, dict) else getattr(mm_inputs, "mm_items", None)
    return found if isinstance(found, list) else []


def may_hold_tensors(request: Any) -> bool:
    """Whether it is worth while to look at a single request at all."""
    return inputs_of(request) is not None or getattr(request, OVERRIDES, None) is not None


def places(request: Any) -> list[Place]:
    """Where a single request has values: once each, whatever number of values there is in a list."""
    mm_inputs, overrides = inputs_of(request), getattr(request, OVERRIDES, None)
    if mm_inputs is None and overrides is None:  # most often: text
        return []
    found = [place for item in items_of(mm_inputs) for place in places_of(item)]
    for name in OF_ALL_ITEMS:
        value = mm_inputs.get(name) if isinstance(mm_inputs, dict) else getattr(mm_inputs, name, None)
        if _may_be_tensors(value):
            found.append(Place(mm_inputs, name))
    if overrides is not None:
        found.append(Place(overrides, "embeds"))
    return found


def places_of(item: Any) -> list[Place]:
    """Where one item has values."""
    found = [Place(item, field) for field in FIELDS if getattr(item, field, None) is not None]
    auxiliary = getattr(item, AUXILIARY, None)
    if isinstance(auxiliary, dict):
        found += [Place(auxiliary, key) for key, value in auxiliary.items() if _may_be_tensors(value)]
    return found


def _may_be_tensors(value: Any) -> bool:
    """Whether there can be tensors or pointers in it: of a list, which may be long, by the first that is there."""
    while isinstance(value, list | tuple):
        value = next((part for part in value if part is not None), None)
    return hasattr(type(value), "shape")


def features_of(item: Any) -> list[Any]:
    """What stands in an item's `feature`: the values of a list, or the one that there is, which may be None."""
    feature = getattr(item, "feature", None)
    return list(feature) if isinstance(feature, list | tuple) else [feature]


def hash_of(item: Any) -> int | None:
    """The engine's hash of an item: of its tensor, or of a list of tensors together; None before it is known."""
    found: int | None = getattr(item, "hash", None)
    return found


def is_padded(item: Any) -> bool:
    """Whether the engine has computed an item's `pad_value`, for which it looks at the feature."""
    return getattr(item, "pad_value", None) is not None


class Place(NamedTuple):
    """One field of an item, of its auxiliary data or of the overrides: a value, or lists and tuples of values."""

    holder: Any
    field: str

    @property
    def is_wrapped_by_engine(self) -> bool:
        """Whether the engine looks for pointers here, to agree on them and to take them: not in lists of lists."""
        if isinstance(self.holder, dict) or self.field not in FIELDS:
            return False
        parts = self.value if isinstance(self.value, list | tuple) else ()
        return not any(isinstance(part, list | tuple) for part in parts)

    @property
    def is_typed_as_tensor(self) -> bool:
        """Whether the engine's message codec may decode nothing but a tensor here (0.5.19 - 0.5.21)."""
        return self.field == "embeds" or self.field in OF_ALL_ITEMS

    @property
    def is_moved_to_device(self) -> bool:
        """Whether the engine puts the device's tensor here; all else stays as it is until the request ends."""
        return self.field == "feature" and not isinstance(self.holder, dict)

    @property
    def is_embedding(self) -> bool:
        """Whether the engine keeps what stands here until the request has ended, and no longer."""
        return self.field == "precomputed_embeddings" and not isinstance(self.holder, dict)

    @property
    def value(self) -> Any:
        return self.holder[self.field] if isinstance(self.holder, dict) else getattr(self.holder, self.field)

    def values(self) -> list[Any]:
        """What stands there now; lists and tuples opened up."""
        return list(_opened_up(self.value))

    def replace(self, replacement: Callable[[Any], Any]) -> None:
        """Put `replacement(value)` in the place of every value, in a list or the same kind of tuple."""
        self.put(_each_replaced(self.value, replacement))

    def put(self, value: Any) -> None:
        """Put a value, or a list of them, in the place of all that stands there."""
        if isinstance(self.holder, dict):
            self.holder[self.field] = value
        else:
            setattr(self.holder, self.field, value)

    def in_other(self, item: Any) -> Place:
        """The same place in another item."""
        return Place(getattr(item, AUXILIARY) if isinstance(self.holder, dict) else item, self.field)


def _opened_up(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _opened_up(part)
    else:
        yield value


def _each_replaced(value: Any, replacement: Callable[[Any], Any]) -> Any:
    if not isinstance(value, list | tuple):
        return replacement(value)
    replaced = [_each_replaced(part, replacement) for part in value]
    if isinstance(value, list):
        return replaced
    made: Callable[..., Any] = getattr(value, "_make", type(value))  # of a named tuple
    return made(replaced)


def own_items(request: Any) -> None:
    """Give a request `mm_inputs`, items, auxiliary data and overrides of its own. Their tensors stay shared.

    Code that replaces something in a request calls this first: other requests may share the objects.
    """
    mm_inputs = inputs_of(request)
    if mm_inputs:
        own = copy.copy(mm_inputs)
        if isinstance(own, dict):
            own["mm_items"] = [_own(item) for item in own.get("mm_items", [])]
        else:
            own.mm_items = [_own(item) for item in own.mm_items]
        setattr(request, "mm_inputs" if hasattr(request, "mm_inputs") else EMBEDDING_INPUTS, own)
    overrides = getattr(request, OVERRIDES, None)
    if overrides is not None:
        setattr(request, OVERRIDES, copy.copy(overrides))


def own_places(request: Any, is_wanted: Callable[[Any], bool]) -> list[Place]:
    """The places of a request with a value that is wanted, in items of the request's own."""

    def there() -> list[Place]:
        return [place for place in places(request) if any(map(is_wanted, place.values()))]

    if not there():
        return []
    own_items(request)
    return there()


def refuse(request: Any, why: Any) -> None:
    """Have the engine find out that a request has lost tensors, and nothing else of them."""
    request.mm_inputs = why
    if getattr(request, OVERRIDES, None) is not None:
        setattr(request, OVERRIDES, None)  # which it would look into even then


def _own(item: Any) -> Any:
    own = copy.copy(item)
    auxiliary = getattr(item, AUXILIARY, None)
    if isinstance(auxiliary, dict):
        setattr(own, AUXILIARY, dict(auxiliary))
    return own


def argument(function: Callable[..., Any], name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """What finds an argument among those of a call; on 0.5.9, for one, a request is not the first."""
    position = list(inspect.signature(function).parameters).index(name)
    return lambda args, kwargs: args[position] if len(args) > position else kwargs[name]
