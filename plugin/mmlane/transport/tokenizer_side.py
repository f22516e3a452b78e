"""How a request leaves a tokenizer, from top to bottom.

The engine's manager is made, and given its side (`start`). It sends a request (`around_send`), perhaps one of
several samples (`with_samples`). On the way the engine makes a pointer of each large tensor, and the pointer
offers the tensor to the transports, one after the other (`Sending.offer`). What was made for a request that could
not be sent is released (`sending`). A request without multimodal inputs is sent as if nothing stood here.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mmlane.engine.requests import places, tokenized
from mmlane.engine.topology import on_cuda, readers_of, without_lane
from mmlane.lane import Lane, memory
from mmlane.log import guarded, logger
from mmlane.transport.base import Here, Payload, Tokenizer
from mmlane.transport.chain import Chain
from mmlane.transport.inline import Inline
from mmlane.transport.lane import LaneTransport, Producer
from mmlane.transport.pointer import slot
from mmlane.transport.samples import Samples

if TYPE_CHECKING:
    from mmlane.transport.metrics import Meter

SIDE = "_mmlane_side"  # the attribute of the engine's tokenizer manager that holds its side

Step = Callable[[Any, Any], AbstractContextManager[None]]  # of a manager and the request that it sends


# --- the side of a tokenizer manager ------------------------------------------------------------------------


class TokenizerSide:
    """What one tokenizer manager sends features by. A process may have several, one for each of its engines.

    The side goes with its manager, and the lane with the side.
    """

    def __init__(self, here: Here) -> None:
        self.chain = Chain(here)
        lane = self.chain.find(LaneTransport)
        assert isinstance(lane, LaneTransport)
        self.producer: Producer | None = lane.producer  # the end of the lane, if the launch has one


def start(manager: Any, server_args: Any, *, capacity: int | None, pinned: int, mode: str) -> None:
    """Give a tokenizer manager that has just been made its side.

    capacity: bytes of its lane, None: the machine's share. pinned: bytes of it that ranks on CUDA register. mode:
    that of mmlane, for the metrics.
    """
    multimodal = getattr(manager.model_config, "is_multimodal", True)
    meter = _meter(manager) if server_args.enable_metrics else None
    engines = slot.chain.here.engines
    here = Here(engines=engines)
    if obstacle := without_lane(server_args):
        if multimodal:
            logger.warning(
                "mmlane: no lane with %s; features travel as they do without it; MMLANE=backport silences this",
                obstacle,
            )
    else:
        here = Tokenizer(
            readers_of(server_args),
            capacity or memory.default_capacity() // max(server_args.tokenizer_worker_num, 1),
            pinned=pinned if on_cuda(server_args) else 0,
            watch=_watch(weakref.ref(manager), meter, mode) if server_args.enable_metrics else None,
            engines=engines,
        )
    side = TokenizerSide(here)
    setattr(manager, SIDE, side)
    producer = side.producer
    if producer is not None and multimodal:
        producer.try_out()
    if meter is not None:
        _begin(meter, manager, mode)


def _meter(manager: Any) -> Meter | None:
    with guarded("metrics", "mmlane is not in /metrics"):
        from mmlane.transport.metrics import Meter  # which needs PROMETHEUS_MULTIPROC_DIR: set by now

        return Meter(manager)
    return None


def _begin(meter: Meter, manager: Any, mode: str) -> None:
    producer: Producer | None = getattr(manager, SIDE).producer
    with guarded("metrics", "mmlane is not in /metrics"):
        meter.begin(meter.state if producer is None else lambda: producer.state, mode)


def _watch(manager: weakref.ref[Any], meter: Meter | None, mode: str) -> Callable[[Lane], None]:
    """What adds a lane to the numbers; a meter that could not be had at start is tried again."""

    def watch(lane: Lane) -> None:
        there = meter
        if there is None and (living := manager()) is not None and (there := _meter(living)) is not None:
            _begin(there, living, mode)
        if there is not None:
            there.watch(lane)

    return watch


# --- a request is sent --------------------------------------------------------------------------------------


def around_send(send: Callable[..., Any], steps: tuple[Step, ...]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request` inside of the steps that patches want, the first outermost."""
    request_of = tokenized(send)

    @contextmanager
    def inside(manager: Any, request: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for step in steps:
                stack.enter_context(step(manager, request))
            yield

    if inspect.iscoroutinefunction(send):  # from 0.5.20 on

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            request = request_of(args, kwargs)
            if getattr(request, "mm_inputs", None) is None:
                return await send(*args, **kwargs)
            with inside(args[0], request):
                return await send(*args, **kwargs)

        return send_async

    @wraps(send)
    def send_one_request(*args: Any, **kwargs: Any) -> Any:
        request = request_of(args, kwargs)
        if getattr(request, "mm_inputs", None) is None:
            return send(*args, **kwargs)
        with inside(args[0], request):
            return send(*args, **kwargs)

    return send_one_request


class Sending:
    """One request while it is sent: by which chain, and what was made for it.

    samples: the requests that share their tensors with this one, with n > 1.
    """

    def __init__(self, chain: Chain, samples: Samples | None = None) -> None:
        self.samples = samples
        self._chain = chain
        self._made: list[Payload] = []

    def offer(self, tensor: torch.Tensor) -> tuple[Payload, bytes | None]:
        """As `Chain.offer`."""
        payload, invitation = self._chain.offer(tensor, self.samples)
        if not isinstance(payload, Inline):
            self._made.append(payload)
        return payload, invitation

    def release(self) -> None:
        """The request was not sent: a payload that has been pickled has no receiver all the same."""
        for payload in self._made:
            with guarded("take back", "a feature that was not sent may stay in memory until the engine ends"):
                payload.release()

    def end(self) -> None:
        """The request has been sent, or not. Whoever copied the context meanwhile may keep this object."""
        self._made.clear()
        self.samples, self._chain = None, slot.chain


@contextmanager
def sending(manager: Any, request: Any) -> Iterator[None]:
    """A step of `around_send`: the request's tensors go by its manager's chain, and do not outlive a failure."""
    side: TokenizerSide | None = getattr(manager, SIDE, None)
    around = slot.scope.get()
    current = Sending(slot.chain if side is None else side.chain, None if around is None else around.samples)
    token = slot.scope.set(current)
    try:
        yield
    except BaseException:
        current.release()
        raise
    finally:
        slot.scope.reset(token)
        current.end()


def wrap_everything(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`wrap_shm_features(obj)` of 0.5.9 - 0.5.12, which also sends lists and embeddings by pointer.

    Those versions wrap an item's `feature` when it is a tensor (from 0.5.11 also a list of tensors). Each tensor
    is shown to the same function as the `feature` of a stand-in, so that its own conditions (transport mode,
    skip_tokenizer_init) decide.
    """

    def pointer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_cpu:
            return value
        item = SimpleNamespace(feature=value)
        wrap(SimpleNamespace(mm_inputs=_Inputs(item)))
        return item.feature

    @wraps(wrap)
    def wrap_shm_features(obj: Any) -> Any:
        with guarded("wrapping", "lists and embeddings of this request are sent inline, which is slower"):
            for place in places(obj):
                place.replace(pointer)
        return wrap(obj)

    return wrap_shm_features


class _Inputs(dict[str, Any]):
    """`mm_inputs` of one item, readable as the dict of 0.5.9 and as the object of later versions."""

    def __init__(self, item: Any) -> None:
        super().__init__(mm_items=[item])
        self.mm_items = self["mm_items"]


# --- samples: n > 1 -----------------------------------------------------------------------------------------


def with_samples(handle: Callable[..., Any]) -> Callable[..., Any]:
    """`TokenizerManager._handle_batch_request`, in which the samples of a request share one copy of a tensor."""

    @wraps(handle)
    def handle_batch_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        responses = handle(self, obj, *args, **kwargs)
        with guarded("share", "each sample of this request has a copy of its own"):
            samples = getattr(obj, "parallel_sample_num", 1)
            if samples != 1:
                return _sharing(responses, Samples(samples + 1))  # the first request warms the prefix
        return responses

    return handle_batch_request


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
