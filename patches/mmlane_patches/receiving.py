"""How the scheduler receives requests: take the features only after all ranks have agreed on them.

The engine's receiving functions stay as they are. Where one of them receives, waits and takes (up to 0.5.12), its
names `unwrap_shm_features` and `has_shm_features` do nothing meanwhile, and we agree and take afterwards. Where
waiting and taking have a function of their own, we agree and take before it, and it finds nothing left to do.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmlane.patching import Refusal
from mmlane_patches import tickets
from mmlane_patches.agreement import LostFeatures, agree, move_out_of_batches
from mmlane_patches.features import replace_values, single_requests
from mmlane_patches.pointer import SegmentPointer

logger = logging.getLogger("mmlane")

SCHEDULER = "sglang.srt.managers.scheduler"

_thread = threading.local()


def carrying_groups(receiver: Any) -> list[Any]:
    """The CPU process groups over which a `Scheduler` or `SchedulerRequestReceiver` was sent its work requests.

    With DP-attention those are its attention TP and CP groups, otherwise the TP group; a group of one is none.
    """
    sizes = getattr(receiver, "ps", receiver)
    # 0.5.17 and 0.5.18 may decide for DP-attention after parsing, and ask this; it is asked where they ask it.
    get_parallel = vars(sys.modules[type(receiver).__module__]).get("get_parallel")
    decided = receiver.server_args if get_parallel is None else get_parallel()
    if decided.enable_dp_attention:
        candidates = [
            (sizes.attn_tp_size, receiver.attn_tp_cpu_group),
            (sizes.attn_cp_size, receiver.attn_cp_cpu_group),
        ]
    else:
        candidates = [(sizes.tp_size, receiver.tp_cpu_group)]
    return [group for size, group in candidates if size > 1]


def take(requests: list[Any]) -> None:
    """Put tensors in the place of the pointers in `requests`, on which all ranks have agreed."""
    for request in single_requests(requests):
        replace_values(request, lambda value: value.materialize() if isinstance(value, SegmentPointer) else value)


@contextmanager
def or_end() -> Iterator[None]:
    """What a rank does here it does as its peers do, or it ends: they would wait for it, or go on without it.

    The engine ends what raises in a scheduler, and itself with it.
    """
    try:
        yield
    except Exception as error:
        logger.critical(
            "mmlane: this rank ends, and the engine with it, because it could not take what its peers take:"
            " %s: %s; start the engine again, with MMLANE=off if this comes back, and please report it",
            *(type(error).__name__, error),
        )
        raise


# --- seams ---


def agree_after_deferring(recv_requests: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`Scheduler.recv_requests` of 0.5.9, with `deferrable` in force: agree and take what it returned."""

    @wraps(recv_requests)
    def receive(self: Any) -> Any:
        _thread.receiving = True
        try:
            received = recv_requests(self)
        finally:
            _thread.receiving = False
        return _finished(self, received)

    return receive


def deferrable(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`unwrap_shm_features(obj)` that leaves pointers alone while requests are received in this thread."""

    @wraps(unwrap)
    def unwrap_shm_features(obj: Any) -> Any:
        return obj if getattr(_thread, "receiving", False) else unwrap(obj)

    return unwrap_shm_features


def agree_after(recv_requests: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`Scheduler.recv_requests` of 0.5.10 - 0.5.12: without its own barrier and taking, which are ours then.

    Raises `Refusal` where the scheduler's module lacks a name that has to do nothing meanwhile.
    """
    meanwhile = {"has_shm_features": _nothing, "unwrap_shm_features": _untouched}
    missing = sorted(meanwhile.keys() - vars(sys.modules[SCHEDULER]).keys())
    if missing:
        raise Refusal(f"wanted {' and '.join(missing)} in {SCHEDULER}, found none")

    @wraps(recv_requests)
    def receive(self: Any) -> Any:
        with _in_place(SCHEDULER, meanwhile):
            received = recv_requests(self)
        _finished(self, received)
        for request in received or ():
            vars(sys.modules[SCHEDULER])["unwrap_shm_features"](request)  # pointers that are not ours, if any
        return received

    return receive


def agree_before(finalize: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`SchedulerRequestReceiver._finalize_shm_features` of 0.5.13 - 0.5.18, which finds nothing left to do."""

    @wraps(finalize)
    def finalize_shm_features(self: Any, recv_reqs: list[Any] | None) -> None:
        _finished(self, recv_reqs)
        finalize(self, recv_reqs)

    return finalize_shm_features


def take_tickets_before(finalize: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`SchedulerRequestReceiver._finalize_shm_features` from 0.5.19 on, which agrees on what segments are left."""
    from sglang.srt.managers.io_struct import MMInputsProcessError

    @wraps(finalize)
    def finalize_shm_features(self: Any, recv_reqs: list[Any] | None) -> None:
        with or_end():
            for request, message in tickets.take(recv_reqs or []):
                request.mm_inputs = MMInputsProcessError(message)
        finalize(self, recv_reqs)

    return finalize_shm_features


def _finished(receiver: Any, received: Any) -> Any:
    if received:
        with or_end():
            lost = tickets.take(received)
            for request, message in lost:
                request.mm_inputs = LostFeatures(message)
            move_out_of_batches(received, [request for request, _ in lost])
            agree(carrying_groups(receiver), received)
            take(received)
    return received


def _nothing(recv_reqs: Any) -> bool:
    return False


def _untouched(obj: Any) -> Any:
    return obj


@contextmanager
def _in_place(module: str, functions: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """While inside, a module's global names stand for other functions. One thread of a scheduler receives."""
    names = vars(sys.modules[module])
    kept = {name: names[name] for name in functions}
    names.update(functions)
    try:
        yield
    finally:
        names.update(kept)
