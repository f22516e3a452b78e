"""Changes a class of the engine when its first object is made: so it surrounds what a plugin has put there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from when_imported import when_imported

TOKENIZER = ("sglang.srt.managers.tokenizer_manager", "TokenizerManager")
SCHEDULER = ("sglang.srt.managers.scheduler", "Scheduler")

Change = Callable[[Any], None]
_changes: dict[tuple[str, str], list[Change]] = {}


def when_made(place: tuple[str, str], change: Change) -> None:
    """Call `change` with the class before its first object, or the first of a derived class, is made."""
    module, name = place
    if place not in _changes:
        when_imported(module, lambda loaded: _at_the_first(getattr(loaded, name), _changes[place]))
    _changes.setdefault(place, []).append(change)


def before_each_send(act: Callable[[Any], None]) -> None:
    """Call `act` with the tokenizer's manager before it sends a request."""

    def watch(manager: Any) -> None:
        send = manager._send_one_request
        if inspect.iscoroutinefunction(send):  # from 0.5.20 on

            @wraps(send)
            async def send_async(self: Any, *args: Any, **kwargs: Any) -> Any:
                act(self)
                return await send(self, *args, **kwargs)

            manager._send_one_request = send_async
        else:

            @wraps(send)
            def send_one_request(self: Any, *args: Any, **kwargs: Any) -> Any:
                act(self)
                return send(self, *args, **kwargs)

            manager._send_one_request = send_one_request

    when_made(TOKENIZER, watch)


def _at_the_first(owner: Any, changes: list[Change]) -> None:
    make = owner.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        while changes:
            changes.pop(0)(owner)
        make(self, *args, **kwargs)

    owner.__init__ = __init__
