"""How the tokenizer sends a request: by whose lane; what cannot be sent leaves no segment and no ticket behind.

A pointer is the receiver's as soon as it has been pickled. When the rest of its request cannot be pickled, or the
socket refuses it, nobody receives it. A request without multimodal inputs is sent as if nothing stood here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from mmlane_patches import lanes
from mmlane_patches.features import tokenized
from mmlane_patches.pointer import made_here


def unlink_if_unsent(send: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request`, whose failure unlinks what was made for it."""
    return _inside(send, lambda manager: _or_unlink())


def by_lane(send: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request`, for which the manager's own lane is used."""
    return _inside(send, _by_lane)


def _inside(
    send: Callable[..., Any], context: Callable[[Any], AbstractContextManager[None]]
) -> Callable[..., Any]:
    request = tokenized(send)

    if inspect.iscoroutinefunction(send):  # from 0.5.20 on

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            if getattr(request(args, kwargs), "mm_inputs", None) is None:
                return await send(*args, **kwargs)
            with context(args[0]):
                return await send(*args, **kwargs)

        return send_async

    @wraps(send)
    def send_one_request(*args: Any, **kwargs: Any) -> Any:
        if getattr(request(args, kwargs), "mm_inputs", None) is None:
            return send(*args, **kwargs)
        with context(args[0]):
            return send(*args, **kwargs)

    return send_one_request


@contextmanager
def _by_lane(manager: Any) -> Iterator[None]:
    token = lanes.producer.set(lanes.producers.get(manager))
    try:
        with _or_unlink():
            yield
    finally:
        lanes.producer.reset(token)


@contextmanager
def _or_unlink() -> Iterator[None]:
    made: list[Any] = []  # pointers, of a segment or a ticket
    token = made_here.set(made)
    try:
        yield
    except BaseException:
        for pointer in made:
            pointer.close_and_unlink()
        raise
    finally:
        made_here.reset(token)
