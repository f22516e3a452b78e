"""How the tokenizer sends a request: by whose lane; what cannot be sent leaves no segment and no ticket behind.

A pointer is the receiver's as soon as it has been pickled. When the rest of its request cannot be pickled, or the
socket refuses it, nobody receives it. A request without multimodal inputs is sent as if nothing stood here.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from functools import wraps
from typing import Any

from mmlane_patches import lanes
from mmlane_patches.features import tokenized
from mmlane_patches.guard import guarded
from mmlane_patches.pointer import made_here


def unlink_if_unsent(send: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request`, whose failure unlinks what was made for it."""
    return _inside(send, lambda manager: _or_unlink())


def by_lane(send: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request`, for which the manager's own lane is used."""
    return _inside(send, _by_lane)


def with_samples(handle: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._handle_batch_request`, in which the samples of a request share one copy of a tensor."""

    @wraps(handle)
    def handle_batch_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        responses = handle(self, obj, *args, **kwargs)
        with guarded("share", "each sample of this request has a copy of its own"):
            samples = getattr(obj, "parallel_sample_num", 1)
            if samples != 1:
                return _sharing(responses, lanes.Samples(samples + 1))  # the first request warms the prefix
        return responses

    return handle_batch_request


async def _sharing(responses: AsyncGenerator[Any, None], together: lanes.Samples) -> AsyncGenerator[Any, None]:
    """The responses of a request with n > 1; all that it sends is sent while one of them is waited for."""
    try:
        async with aclosing(responses):
            while True:
                token = lanes.samples.set(together)
                try:
                    response = await anext(responses)
                except StopAsyncIteration:
                    return
                finally:
                    lanes.samples.reset(token)
                yield response
    finally:
        with guarded("share", "a copy that samples shared may stay in the lane"):
            together.close()


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
    found = None
    with guarded("send", "the features of this request go by shared-memory segments"):
        found = lanes.producers.get(manager)
    token = lanes.producer.set(found)
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
            with guarded("take back", "a feature that was not sent may stay in memory until the engine ends"):
                pointer.close_and_unlink()
        raise
    finally:
        made_here.reset(token)
