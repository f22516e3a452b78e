"""How ranks make requests ready with --enable-broadcast-mm-inputs-process: one for all, but for the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from mmlane.engine.requests import Place, items_of, places_of
from mmlane.transport.inline import SMALL, is_sent


def without_tensors(process: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`Scheduler._process_and_broadcast_mm_inputs(self, raw_mm_inputs)`, which broadcasts no tensors.

    The first rank hashes the inputs for all, and pickles them to ranks that have the same tensors already. There
    they are set aside for that, and the others put their own in. 0.5.9, which splits items then, does as it did.
    """

    @wraps(process)
    def process_mm_inputs(self: Any, raw_mm_inputs: Any) -> Any:
        if not items_of(raw_mm_inputs) or isinstance(raw_mm_inputs, dict):
            return process(self, raw_mm_inputs)
        kept = [item for item in items_of(raw_mm_inputs) if item.is_valid()]  # as the engine does
        if self.dp_tp_group.rank_in_group == 0:
            with _set_aside(kept):
                return process(self, raw_mm_inputs)
        processed = process(self, raw_mm_inputs)
        for own, item in zip(kept, items_of(processed), strict=False):
            for place in places_of(own):
                if place.in_other(item).value is None:
                    place.in_other(item).put(place.value)
        return processed

    return process_mm_inputs


@contextmanager
def _set_aside(there: list[Any]) -> Iterator[None]:
    """While inside, items are hashed and have none of their large CPU tensors."""
    aside: list[tuple[Place, Any]] = []
    with suppress(Exception):  # the engine meets the same error where it hashes, and tells the other ranks
        for item in there:
            item.set_pad_value()
        aside = [(place, place.value) for item in there for place in places_of(item) if _is_large(place.values())]
    for place, _ in aside:
        place.put(None)
    try:
        yield
    finally:
        for place, value in aside:
            place.put(value)


def _is_large(values: list[Any]) -> bool:
    return all(map(is_sent, values)) and sum(value.nbytes for value in values) > SMALL
