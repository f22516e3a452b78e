"""What a scheduler of the engine is made of, where that is not the same on every release."""

from __future__ import annotations

import sys
from typing import Any


def receiver_of(scheduler: Any) -> Any:
    """What receives a scheduler's requests: from 0.5.13 on an object of its own, before that the scheduler."""
    return getattr(scheduler, "request_receiver", scheduler)


def put_before_broadcast(receiver: Any, gate: Any) -> None:
    """Have requests pass `gate.handle` before they are broadcast, in the place of the engine's `input_blocker`."""
    object.__setattr__(receiver, "input_blocker", gate)  # from 0.5.13 on it is frozen


def answer_tokenizer(scheduler: Any, request: Any, output: Any) -> None:
    """Send an output to the tokenizer that a request came from; from 0.5.13 on by one of `ipc_channels`."""
    getattr(scheduler, "ipc_channels", scheduler).send_to_tokenizer.send_output(output, request)


def wake_when_readable(scheduler: Any, file: int) -> None:
    """Have a scheduler that sleeps while it is idle (--sleep-on-idle) wake up when a file can be read."""
    import zmq

    if (sleeper := getattr(scheduler, "idle_sleeper", None)) is not None:
        sleeper.poller.register(file, zmq.POLLIN)


def may_hold_pointers(requests: list[Any]) -> bool:
    """Whether the engine sees pointers in requests; on 0.5.9 it does not look, and there may be some."""
    has = getattr(_mm_utils(), "has_shm_features", None)  # from 0.5.10 on
    return has is None or bool(has(requests))


def unwrap(request: Any) -> None:
    """Have the engine take the pointers of a request, by whatever is in the place of its function."""
    _mm_utils().unwrap_shm_features(request)


def _mm_utils() -> Any:
    return sys.modules["sglang.srt.managers.mm_utils"]
