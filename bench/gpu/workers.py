"""Spawned processes that do as they are told over a pipe, and end with the benchmark however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from bench.transport.group import Failed, Refusal
from bench.transport.worker import die_with

_ROLES = ("bench.gpu.device", "bench.gpu.team", "bench.gpu.measures")
_PATIENCE_S = 300.0
_GRACE_S = 10.0


_context: Any = multiprocessing.get_context("spawn")  # each process as fresh as can be


def hurry() -> None:
    """For a rehearsal: fork processes from one that has imported torch, which takes seconds."""
    global _context
    os.environ["OMP_NUM_THREADS"] = "1"  # theirs
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(list(_ROLES))


class Worker:
    """A process with an object of `role`, made there with `arguments`; orders are names of its methods.

    The first answer says whether it could be made. The role has a `close`, called in the end.
    """

    def __init__(self, role: Callable[..., Any], *arguments: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, role, arguments), daemon=True)
        with interrupts_held():
            self._process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> None:
        """Give an order. A process that has ended says so in its answer."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            return

    def answer(self) -> Any:
        """What came of the oldest order that is not answered yet. Raises Failed, Refusal."""
        try:
            if not self._pipe.poll(_PATIENCE_S):
                self.end()
                raise Failed(f"no answer in {_PATIENCE_S:g} s")
            kind, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE_S)
            raise Failed(f"its process ended, exit code {self._process.exitcode}") from None
        if kind == "ok":
            return result
        raise (Refusal if kind == "refused" else Failed)(result)

    def call(self, name: str, *arguments: Any) -> Any:
        """Order and answer."""
        self.ask(name, *arguments)
        return self.answer()

    def end(self) -> None:
        """Have it end, in an orderly way if possible."""
        self._pipe.close()
        self._process.join(_GRACE_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def gather(workers: Sequence[Worker]) -> list[Any]:
    """The answers of all; then raises what the first one raised that failed."""
    answers: list[Any] = []
    problems: list[Failed | Refusal] = []
    for worker in workers:
        try:
            answers.append(worker.answer())
        except (Failed, Refusal) as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    return answers


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end, for the benchmark; processes started inside never see it, it is not for them.

    Blocking is what they inherit. It is not enough here, where another thread takes the signal for the main one.
    """
    resource_tracker.ensure_running()  # its own start would let interrupts through
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def _serve(pipe: Connection, role: Callable[..., Any], arguments: Sequence[Any]) -> None:
    die_with(os.getppid())  # had it ended before that, the pipe would say so
    made: list[Any] = []
    with suppress(EOFError, ConnectionError):  # nobody is there any more who gives orders
        pipe.send(_do(lambda: made.append(role(*arguments))))
        while True:
            name, values = pipe.recv()
            pipe.send(_do(lambda: getattr(made[0], name)(*values)))  # noqa: B023 - done before the next
    for one in made:
        one.close()


def _do(order: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "ok", order()
    except Refusal as reason:
        return "refused", str(reason)
    except Exception as error:  # noqa: BLE001 - whatever it is, who gave the order is told
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
