"""What is sent inside of a request is sent without the rest of its storage, all of which would be pickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmlane.engine.requests import Place, own_places
from mmlane.log import guarded
from mmlane.transport.inline import compact, is_compact, is_sent, sent_from
from mmlane.transport.pointer import slot
from mmlane.transport.samples import Samples


@contextmanager
def compacting(requests: list[Any]) -> Iterator[None]:
    """A step of `tokenizer_side.around_wrap`: at its end, what is left in the requests travels inline."""
    yield
    with guarded("compacting", "this request is sent with all of the storage behind its tensors, which is slower"):
        compact_all(requests)


def compact_all(requests: list[Any]) -> None:
    """Put compact copies in the place of the requests' CPU tensors; one of each for all samples of a request."""
    current = slot.scope.get()
    samples = Samples() if current is None else current.samples
    found = (own_places(request, lambda value: is_sent(value) and not is_compact(value)) for request in requests)
    there = [place for places in found for place in places]
    samples.expect(sent_from(there))
    for place in there:
        compact_in(place, samples)


def compact_in(place: Place, samples: Samples) -> None:
    """Put compact copies in the place of the CPU tensors that stand in one."""
    place.replace(lambda value: compact(value, samples) if is_sent(value) else value)
