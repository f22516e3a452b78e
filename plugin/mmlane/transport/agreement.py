"""All ranks that receive the same requests find out together which of those have lost a feature.

One all-reduce is both things that are needed before a feature is taken: a barrier, so that no rank unlinks a
segment that a peer has not opened yet, and the agreement that keeps one lost segment from stopping one rank
while the others run on. It costs nothing for requests without pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from http import HTTPStatus
from typing import Any

import torch
import torch.distributed

from mmlane.engine.requests import Place, batch_of, id_of, inputs_of, places, single_requests
from mmlane.log import logger
from mmlane.transport.base import lost_message
from mmlane.transport.pointer import ShmPointerMMData, is_pointer


@dataclass
class Arrival:
    """A request with pointers, and where they stand in it. lost: why it has to be refused; "" if it has not."""

    request: Any
    places: list[Place]
    lost: str = field(default="", init=False)

    def pointers(self) -> list[ShmPointerMMData]:
        """Those that have not been taken."""
        found = [value for place in self.places for value in place.values()]
        return [value for value in found if is_pointer(value)]

    def release(self) -> None:
        """Let go of the pointers that have not been taken."""
        for pointer in self.pointers():
            pointer.close_and_unlink()


def arrivals(requests: Sequence[Any]) -> list[Arrival]:
    """The requests that hold pointers: the one look at all that a batch of requests consists of."""
    found = []
    for request in single_requests(requests):
        if there := places(request):
            arrival = Arrival(request, there)
            if arrival.pointers():
                found.append(arrival)
    return found


def taker(place: Place, *, of: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """What takes the pointers that stand in a place, of one kind; all else stays."""

    def taken(value: Any) -> Any:
        if not of(value):
            return value
        tensor = value.materialize()
        if place.is_moved_to_device or not value.payload.lends:
            return tensor
        # The engine keeps embeddings until the request has ended, and what is beside them perhaps longer.
        return tensor if place.is_embedding and value.payload.may_be_kept() else tensor.clone()

    return taken


@contextmanager
def end_on_error() -> Iterator[None]:
    """What a rank does here it does as its peers do, or it ends: they would wait for it, or go on without it.

    The engine ends what raises in a scheduler, and itself with it.
    """
    try:
        yield
    except Exception as error:
        logger.critical(
            "this rank ends, and the engine with it, because it could not do what its peers do:"
            " %s: %s; start the engine again, with MMLANE=off if this comes back, and please report it",
            *(type(error).__name__, error),
        )
        raise


@dataclass(frozen=True)
class RefusedInputs:
    """What a request carries as `mm_inputs` once its features are lost; to the engine it looks like no inputs.

    It is pickled on to later pipeline stages, which then refuse the request as well.
    """

    message: str
    mm_items: tuple[()] = ()

    def __bool__(self) -> bool:
        return False


def agree(groups: Sequence[Any], arrived: Sequence[Arrival]) -> None:
    """Wait until every rank has opened what `arrived` holds, and say which requests are `lost` to any rank.

    `groups` are the process groups (CPU) that carried the requests, and `arrived` is the same on every rank.
    Afterwards what is not lost can be taken without fail; the pointers of what is lost are released.
    """
    errors = [_error(arrival) for arrival in arrived]
    # On the CPU whatever torch's default device: so are the groups.
    failed = torch.tensor([error is not None for error in errors], dtype=torch.int32, device="cpu")
    for group in groups:
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
    for arrival, error, is_lost in zip(arrived, errors, failed.tolist(), strict=True):
        if is_lost:
            _give_up(arrival, error)


def _error(arrival: Arrival) -> str | None:
    errors = (pointer.payload.prepare() for pointer in arrival.pointers())
    return next((error for error in errors if error is not None), None)


def _give_up(arrival: Arrival, error: str | None) -> None:
    cause = "on at least one rank"
    payloads = [pointer.payload for pointer in arrival.pointers()]
    logger.error(
        "request %s: %s",
        id_of(arrival.request),
        lost_message(payloads, error or f"{cause}; this one has them"),
    )
    arrival.lost = lost_message(payloads, cause)
    arrival.release()


def move_out_of_batches(requests: list[Any], lost: list[Any]) -> None:
    """Have the `lost` requests handled by themselves, each behind the batch that it came in."""
    if not lost:
        return

    def is_lost(request: Any) -> bool:
        return any(request is other for other in lost)

    kept: list[Any] = []
    for request in requests:
        batch = batch_of(request)
        if batch is None or not any(map(is_lost, batch)):
            kept.append(request)
            continue
        refused = [single for single in batch if is_lost(single)]
        batch[:] = [single for single in batch if not is_lost(single)]
        kept += [request, *refused] if batch else refused
    requests[:] = kept


def refuse_lost(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`handle(scheduler, recv_req)` that answers a request with `RefusedInputs` with an HTTP 500.

    The scheduler sends what a handler returns to the tokenizer that the request came from.
    """

    @wraps(original)
    def handle(self: Any, recv_req: Any) -> Any:
        lost = inputs_of(recv_req)
        if not isinstance(lost, RefusedInputs):
            return original(self, recv_req)
        return aborted(recv_req, lost.message)

    return handle


def aborted(request: Any, message: str) -> Any:
    """What tells a tokenizer that a request of its has failed, with an HTTP 500."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(
        rid=request.rid,
        finished_reason={
            "type": "abort",
            "message": message,
            "status_code": HTTPStatus.INTERNAL_SERVER_ERROR,
            "err_type": "InternalServerError",
        },
    )
