"""Waiting for what has to happen, however busy the machine is; and threads beside a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

T = TypeVar("T")

DEADLINE = 90.0  # seconds; only a fault takes that long


def eventually(condition: Callable[[], T], what: str) -> T:
    """Poll a condition for which there is no event, until it holds; returns what it says then."""
    until = time.monotonic() + DEADLINE
    while not (result := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"{what}: not within {DEADLINE:g} s; the last look found {result!r}")
        time.sleep(0.005)
    return result


@contextmanager
def in_a_thread(work: Callable[[], object]) -> Iterator[None]:
    """Run something beside the block; what it raises, comes out at the end of the block."""
    problems: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)
            raise

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the thread does not come to an end"
    for problem in problems:
        raise problem


def in_threads(works: list[Callable[[], object]]) -> None:
    """Run these at once; an error in one of them is an error here."""
    with ExitStack() as scope:
        for work in works:
            scope.enter_context(in_a_thread(work))
