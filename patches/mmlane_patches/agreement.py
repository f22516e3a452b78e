"""All ranks that receive the same requests find out together which of those have lost a feature.

One all-reduce is both things that are needed before a feature is taken: a barrier, so that no rank unlinks a
segment that a peer has not opened yet, and the agreement that keeps one lost segment from stopping one rank
while the others run on. It costs nothing for requests without pointers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from typing import Any

import torch
import torch.distributed

from mmlane_patches.features import single_requests, values
from mmlane_patches.pointer import SegmentPointer, lost_message

logger = logging.getLogger("mmlane")


@dataclass(frozen=True)
class LostFeatures:
    """What a request carries as `mm_inputs` once its features are lost; to the engine it looks like no inputs.

    It is pickled on to later pipeline stages, which then refuse the request as well.
    """

    message: str
    mm_items: tuple[()] = ()

    def __bool__(self) -> bool:
        return False


def agree(groups: Sequence[Any], requests: list[Any]) -> None:
    """Wait until every rank has opened the pointers in `requests`, and drop the features that any rank lacks.

    `groups` are the process groups (CPU) that carried the requests, and `requests` what they carried, the same
    on every rank: whether there is anything to agree on is decided by the requests alone. Afterwards every
    pointer left can be taken without fail; a request of which one is unreadable on any rank has `LostFeatures`
    as its `mm_inputs`, on every rank, and its segments are removed. Inside a batch it is moved out behind it,
    because the engine answers a refused request only where it handles it by itself.
    """
    holders = [request for request in single_requests(requests) if pointers(request)]
    if not holders:
        return
    errors = [_error(request) for request in holders]
    # On the CPU whatever torch's default device: so are the groups.
    failed = torch.tensor([error is not None for error in errors], dtype=torch.int32, device="cpu")
    for group in groups:
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
    if not failed.any():
        return
    lost = [request for request, bad in zip(holders, failed.tolist(), strict=True) if bad]
    for request, error in zip(holders, errors, strict=True):
        if any(request is other for other in lost):
            _give_up(request, error)
    move_out_of_batches(requests, lost)


def pointers(request: Any) -> list[SegmentPointer]:
    """The pointers in the items of a single request."""
    return [value for value in values(request) if isinstance(value, SegmentPointer)]


def _error(request: Any) -> str | None:
    return next((error for pointer in pointers(request) if (error := pointer.prepare()) is not None), None)


def _give_up(request: Any, error: str | None) -> None:
    found = pointers(request)
    cause = "on at least one rank"
    logger.error(
        "mmlane: request %s: %s",
        getattr(request, "rid", None),
        lost_message([pointer.shm_name for pointer in found], error or f"{cause}; this one has them"),
    )
    for pointer in found:
        pointer.close_and_unlink()
    request.mm_inputs = LostFeatures(lost_message([pointer.shm_name for pointer in found], cause))


def move_out_of_batches(requests: list[Any], lost: list[Any]) -> None:
    """Have the `lost` requests handled by themselves, each behind the batch that it came in."""
    if not lost:
        return

    def is_lost(request: Any) -> bool:
        return any(request is other for other in lost)

    kept: list[Any] = []
    for request in requests:
        batch = getattr(request, "batch", None)
        if not isinstance(batch, list) or not any(map(is_lost, batch)):
            kept.append(request)
            continue
        refused = [single for single in batch if is_lost(single)]
        batch[:] = [single for single in batch if not is_lost(single)]
        kept += [request, *refused] if batch else refused
    requests[:] = kept


def refuse_lost(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`handle(scheduler, recv_req)` that answers a request with `LostFeatures` with an HTTP 500.

    The scheduler sends what a handler returns to the tokenizer that the request came from.
    """

    @wraps(original)
    def handle(self: Any, recv_req: Any) -> Any:
        lost = getattr(recv_req, "mm_inputs", None)
        if not isinstance(lost, LostFeatures):
            return original(self, recv_req)
        from sglang.srt.managers.io_struct import AbortReq

        return AbortReq(
            rid=recv_req.rid,
            finished_reason={
                "type": "abort",
                "message": lost.message,
                "status_code": HTTPStatus.INTERNAL_SERVER_ERROR,
                "err_type": "InternalServerError",
            },
        )

    return handle
