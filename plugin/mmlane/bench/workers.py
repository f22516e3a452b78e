"""Processes that do as they are told over a pipe: both ends of it. Needs the standard library alone."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


class Failed(RuntimeError):
    """A worker could not do it, has ended, or did not answer: in one line, and then what more is known."""


class Refusal(RuntimeError):
    """This way cannot carry this case, for a reason that is not a fault: shown, recorded, and passed over."""


class Worker(ABC):
    """The benchmark's end. Orders are names of methods of an object in the process, with their arguments."""

    _pipe: Connection

    def ask(self, order: str, *arguments: Any) -> None:
        """Give an order. A process that has ended says so in its answer."""
        with suppress(OSError):
            self._pipe.send((order, arguments))

    def answer(self, patience_s: float = 300.0) -> Any:
        """What came of the oldest order that is not answered yet. Raises Failed, Refusal."""
        try:
            there = self._pipe.poll(patience_s)
            kind, result = self._pipe.recv() if there else ("no answer", f"no answer in {patience_s:g} s")
        except (EOFError, OSError):
            kind, result = "ended", "its process ended"
        if kind == "ok":
            return result
        if kind == "refused":
            raise Refusal(result)
        if kind == "failed":
            raise Failed(f"{result}\n{self.trace()}".strip())
        self.end()
        trace = self.trace()
        last = trace.rpartition("\n")[2]
        raise Failed(f"{result}: {last}\n{trace}")

    def call(self, order: str, *arguments: Any) -> Any:
        """Order and answer."""
        self.ask(order, *arguments)
        return self.answer()

    @abstractmethod
    def end(self) -> None:
        """Have it end, in an orderly way if possible; return when it has."""

    @abstractmethod
    def trace(self) -> str:
        """What it has logged, or how it ended, if it has; the last line says most."""


def obey(pipe: Connection, target: object, *, until_fault: bool = False) -> bool:
    """Answer orders until the pipe is closed. `until_fault`: or until one could not be done; False then."""
    with suppress(EOFError, ConnectionError):
        while True:
            order, arguments = pipe.recv()
            answer = answer_of(getattr(target, order), *arguments)
            pipe.send(answer)
            if until_fault and answer[0] != "ok":
                return False
    return True


def answer_of(order: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """What `Worker.answer` understands: that it is done, with the result, or why it is not."""
    try:
        return "ok", order(*arguments)
    except Refusal as reason:
        return "refused", str(reason)
    except Exception as error:  # noqa: BLE001 - whatever it is, who gave the order is told
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def die_with(parent: int) -> None:
    """End this process when that one, its parent, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we could ask
        raise SystemExit(1)
