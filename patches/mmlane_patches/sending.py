"""How the tokenizer sends a request: what cannot be sent leaves no segment behind.

A pointer is the receiver's as soon as it has been pickled. When the rest of its request cannot be pickled, or the
socket refuses it, nobody receives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmlane_patches.pointer import SegmentPointer, made_here


def unlink_if_unsent(send: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request`, a coroutine function from 0.5.20 on, whose failure unlinks."""
    if inspect.iscoroutinefunction(send):

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            with _or_unlink():
                return await send(*args, **kwargs)

        return send_async

    @wraps(send)
    def send_one_request(*args: Any, **kwargs: Any) -> Any:
        with _or_unlink():
            return send(*args, **kwargs)

    return send_one_request


@contextmanager
def _or_unlink() -> Iterator[None]:
    made: list[SegmentPointer] = []
    token = made_here.set(made)
    try:
        yield
    except BaseException:
        for pointer in made:
            pointer.close_and_unlink()
        raise
    finally:
        made_here.reset(token)
