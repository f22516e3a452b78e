"""How a request leaves a tokenizer, from top to bottom.

The engine's manager is made, and given its side (`start`). It sends a request (`around_send`), perhaps one of
several samples (`sharing`), or a batch of them (`around_send_batch`). Where the engine wraps features
(`around_wrap`), every tensor of the request is offered to the transports, one after the other, and a pointer
stands in its place (`Sending.offer_all`). What was made for a request that could not be sent is released
(`sending`). A request without tensors is sent as if nothing stood here.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from mmlane.engine.launch import engine_takes_pointers, is_multimodal, on_cuda, speaks_msgpack, without_lane
from mmlane.engine.requests import Place, argument, hash_of, may_hold_tensors, own_places
from mmlane.engine.topology import readers_of
from mmlane.lane import Lane, memory
from mmlane.log import guarded, logger
from mmlane.transport.base import Here, Payload, Tokenizer
from mmlane.transport.chain import Chain
from mmlane.transport.compacting import compact_in
from mmlane.transport.from_gpu import into_lane
from mmlane.transport.inline import Inline, is_sent, sent_from
from mmlane.transport.lane import LaneTransport, Producer
from mmlane.transport.pointer import our_class_is_in_place, slot
from mmlane.transport.samples import Samples

if TYPE_CHECKING:
    from mmlane.transport.metrics import Meter

SIDE = "_mmlane_side"  # the attribute of the engine's tokenizer manager that holds its side

Step = Callable[[Any, Any], AbstractContextManager[None]]  # of a manager and the request that it sends
Wrapping = Callable[[list[Any]], AbstractContextManager[None]]  # of requests


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
    multimodal = is_multimodal(manager)
    meter = _meter(manager) if server_args.enable_metrics else None
    engine_class = slot.chain.here.engine_class
    here = Here(engine_class=engine_class)
    if obstacle := without_lane(server_args):
        if multimodal:
            logger.warning(
                "no lane with %s; features travel as they do without it; MMLANE=backport silences this",
                obstacle,
            )
    else:
        here = Tokenizer(
            readers_of(server_args),
            capacity or memory.default_capacity() // max(server_args.tokenizer_worker_num, 1),
            pinned=pinned if on_cuda(server_args) else 0,
            watch=_watch(weakref.ref(manager), meter, mode) if server_args.enable_metrics else None,
            engine_class=engine_class,
        )
    side = TokenizerSide(here)
    setattr(manager, SIDE, side)
    producer = side.producer
    if producer is not None and multimodal:
        producer.try_out()
        if on_cuda(server_args):
            with guarded("processing on the GPU", "features are copied twice, which is slower"):
                into_lane(manager.mm_processor, producer)
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


def around_send(send: Callable[..., Any], steps: tuple[Step, ...]) -> Callable[..., Any]:
    """`TokenizerManager._send_one_request` inside of the steps that patches want, the first outermost."""

    @contextmanager
    def inside(manager: Any, request: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for step in steps:
                stack.enter_context(step(manager, request))
            yield

    return _around(send, argument(send, "tokenized_obj"), may_hold_tensors, inside)


def around_send_batch(send: Callable[..., Any], steps: tuple[Wrapping, ...]) -> Callable[..., Any]:
    """`TokenizerManager._send_batch_request` after the steps of `around_wrap`: the engine does not wrap these.

    There are tensors in one only of an embedding model, or with embeddings that override those of the text.
    """

    def has_tensors(requests: list[Any]) -> bool:
        return any(map(may_hold_tensors, requests))

    @contextmanager
    def inside(manager: Any, requests: list[Any]) -> Iterator[None]:
        with sending(manager, requests):
            with ExitStack() as stack:
                for step in steps:
                    stack.enter_context(step(requests))
            yield

    return _around(send, argument(send, "tokenized_objs"), has_tensors, inside)


def _around(
    send: Callable[..., Any],
    sent_of: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    concerns: Callable[[Any], bool],
    inside: Callable[[Any, Any], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """A method that sends, called inside of a context where that concerns what it sends."""
    if inspect.iscoroutinefunction(send):  # from 0.5.20 on

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            sent = sent_of(args, kwargs)
            if not concerns(sent):
                return await send(*args, **kwargs)
            with inside(args[0], sent):
                return await send(*args, **kwargs)

        return send_async

    @wraps(send)
    def send_now(*args: Any, **kwargs: Any) -> Any:
        sent = sent_of(args, kwargs)
        if not concerns(sent):
            return send(*args, **kwargs)
        with inside(args[0], sent):
            return send(*args, **kwargs)

    return send_now


class Sending:
    """One request while it is sent, or a batch: by which chain, and what was made for it.

    shared: what the requests share that have the same tensors as this one, with n > 1.
    """

    def __init__(self, chain: Chain, shared: Samples | None = None) -> None:
        self.shared = shared
        self.samples = Samples() if shared is None else shared
        self._chain = chain
        self._made: list[Payload] = []
        self._offered = False

    def offer_all(self, requests: list[Any]) -> None:
        """Put what is to travel in the place of every CPU tensor of the requests."""
        there = [place for request in requests for place in own_places(request, is_sent)]
        self.samples.expect(sent_from(there))
        are_taken = bool(there) and engine_takes_pointers()
        are_typed = bool(there) and speaks_msgpack()
        for place in there:
            if are_typed and place.is_typed_as_tensor:
                compact_in(place, self.samples)
            else:
                place.replace(self._sender(place, ranks_agree=are_taken and place.is_wrapped_by_engine))
        self._offered = True

    def _sender(self, place: Place, *, ranks_agree: bool) -> Callable[[Any], Any]:
        # The engine's hash of an item is one of a list of tensors together.
        is_hashed = place.is_wrapped_by_engine and isinstance(place.value, torch.Tensor)
        precomputed_hash = hash_of(place.holder) if is_hashed else None

        def sent(value: Any) -> Any:
            if not is_sent(value):
                return value
            return slot.pointers.of(value, *self._offer(value, ranks_agree=ranks_agree), precomputed_hash)

        return sent

    def offer(self, tensor: torch.Tensor) -> tuple[Payload, bytes | None]:
        """As `Chain.offer`, for a pointer that the engine makes; what has been offered before stays inline."""
        return (Inline(tensor), None) if self._offered else self._offer(tensor, ranks_agree=True)

    def _offer(self, tensor: torch.Tensor, *, ranks_agree: bool) -> tuple[Payload, bytes | None]:
        payload, invitation = self._chain.offer(tensor, self.samples, ranks_agree=ranks_agree)
        if not isinstance(payload, Inline):
            self._made.append(payload)
        return payload, invitation

    def release(self) -> None:
        """The request was not sent: a payload that has been pickled has no receiver all the same."""
        for payload in self._made:
            with guarded("take back", "a feature that was not sent may stay in memory until the engine ends"):
                payload.release()

    def end(self) -> None:
        """The request has been sent, or not. A copy of the context may keep this object."""
        self._made.clear()
        self.shared, self.samples, self._chain = None, Samples(), slot.chain


@contextmanager
def sending(manager: Any, request: Any) -> Iterator[None]:
    """A step of `around_send`: the request's tensors go by its manager's chain, and do not outlive a failure."""
    side: TokenizerSide | None = getattr(manager, SIDE, None)
    around = slot.scope.get()
    current = Sending(slot.chain if side is None else side.chain, None if around is None else around.shared)
    token = slot.scope.set(current)
    try:
        yield
    except BaseException:
        current.release()
        raise
    finally:
        current.end()
        with suppress(ValueError):  # the loop has closed this coroutine, in another context
            slot.scope.reset(token)


def around_wrap(wrap: Callable[[Any], Any], steps: tuple[Wrapping, ...]) -> Callable[[Any], Any]:
    """`mm_utils.wrap_shm_features(obj)` inside of the steps that patches want, the first outermost.

    The engine calls it with each request just before it is pickled, and wraps what it knows of, in launches in
    which its ranks take that.
    """

    @wraps(wrap)
    def wrap_shm_features(obj: Any) -> Any:
        if not may_hold_tensors(obj):
            return wrap(obj)
        with ExitStack() as stack:
            for step in steps:
                stack.enter_context(step([obj]))
            return wrap(obj)

    return wrap_shm_features


@contextmanager
def offering(requests: list[Any]) -> Iterator[None]:
    """A step of `around_wrap`: every tensor goes by the transports, also what the engine would send inline."""
    current = slot.scope.get()
    with guarded("wrapping", "tensors of this request are sent inline, which is slower"):
        if current is not None and our_class_is_in_place():
            current.offer_all(requests)
    yield
