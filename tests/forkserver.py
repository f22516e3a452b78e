"""Processes for tests, forked from a server that has imported what takes long.

Each is there at once instead of after seconds of imports, and shares no thread with the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "hypothesis", "pytest", "mmlane.lane"])


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in another process; raises when that process does not end well."""
    ours, theirs = FORKED.Pipe()
    process = FORKED.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()
        assert process.exitcode == 0


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
