"""The samples of a request with n > 1, which the engine sends one by one, share one copy of each tensor."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import wraps
from typing import Any

from mmlane.engine.prompts import sample_count
from mmlane.log import guarded
from mmlane.transport.pointer import slot
from mmlane.transport.samples import Samples
from mmlane.transport.tokenizer_side import Sending

Sharing = Callable[[Any, AsyncGenerator[Any, None]], AsyncGenerator[Any, None]]  # of a request and its responses


def around_samples(handle: Callable[..., Any], steps: tuple[Sharing, ...]) -> Callable[..., Any]:
    """`TokenizerManager._handle_batch_request`, whose responses pass through the steps that patches want."""

    @wraps(handle)
    def handle_batch_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        responses = handle(self, obj, *args, **kwargs)
        for step in steps:
            responses = step(obj, responses)
        return responses

    return handle_batch_request


def with_samples(obj: Any, responses: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """A step of `around_samples`: the samples of a request share one copy of a tensor."""
    with guarded("share", "each sample of this request has a copy of its own"):
        samples = sample_count(obj)
        if samples != 1:
            return _sharing(responses, Samples(samples + 1))  # the first request warms the prefix
    return responses


async def _sharing(responses: AsyncGenerator[Any, None], samples: Samples) -> AsyncGenerator[Any, None]:
    """The responses of a request with n > 1; all that it sends is sent while one of them is waited for."""
    around = Sending(slot.chain, samples)
    try:
        async with aclosing(responses):
            while True:
                token = slot.scope.set(around)
                try:
                    response = await anext(responses)
                except StopAsyncIteration:
                    return
                finally:
                    slot.scope.reset(token)
                yield response
    finally:
        around.end()
        with guarded("share", "a copy that samples shared may stay in the lane"):
            samples.close()
