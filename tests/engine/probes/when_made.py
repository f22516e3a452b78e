"""Changes a class of the engine when its first object is made: so it surrounds what a plugin has put there."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

TOKENIZER = ("sglang.srt.managers.tokenizer_manager", "TokenizerManager")
SCHEDULER = ("sglang.srt.managers.scheduler", "Scheduler")

Change = Callable[[Any], None]
_changes: dict[str, tuple[str, list[Change]]] = {}


def when_made(place: tuple[str, str], change: Change) -> None:
    """Call `change` with the class before an object of it, or of a class that derives from it, is made."""
    module, name = place
    if not _changes:
        sys.meta_path.insert(0, _Imports())
    _changes.setdefault(module, (name, []))[1].append(change)


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


class _Imports:
    """Meta path finder: finds nothing itself, and comes in when one of the modules has been run."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name not in _changes or name in self._searching:
            return None
        self._searching.add(name)  # because this asks the meta path too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            owner, changes = _changes[name]
            _at_the_first(getattr(module, owner), changes)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _at_the_first(owner: Any, changes: list[Change]) -> None:
    make = owner.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        while changes:
            changes.pop(0)(owner)
        make(self, *args, **kwargs)

    owner.__init__ = __init__
