"""Workers that Python spawns; they end with the benchmark however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from mmlane.bench.workers import Failed, Refusal, Worker, answer_of, die_with, obey

_GRACE_S = 10.0


_context: Any = multiprocessing.get_context("spawn")  # each process as fresh as can be


def hurry(*modules: str) -> None:
    """For a rehearsal: fork processes from one that has imported these modules, which takes seconds."""
    global _context
    os.environ["OMP_NUM_THREADS"] = "1"  # theirs
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(list(modules))


class Spawned(Worker):
    """A process with an object of `role`, made there with `arguments`, that obeys.

    The first answer says whether it could be made. The role has a `close`, called in the end.
    """

    def __init__(self, role: Callable[..., Any], *arguments: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, role, arguments), daemon=True)
        with interrupts_held():
            self._process.start()
        theirs.close()

    def end(self) -> None:
        self._pipe.close()
        self._process.join(_GRACE_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def trace(self) -> str:
        code = self._process.exitcode
        return "" if code is None else f"exit code {code}"


@contextmanager
def spawned(role: Callable[..., Any], *arguments: Any) -> Iterator[Spawned]:
    """A worker that could be made, ended afterwards. Raises Failed, Refusal."""
    worker = Spawned(role, *arguments)
    try:
        worker.answer()
        yield worker
    finally:
        worker.end()


def gather(workers: Sequence[Spawned]) -> list[Any]:
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
    with suppress(ConnectionError):  # the process that gives orders has ended
        pipe.send(answer_of(lambda: made.append(role(*arguments))))
    for one in made:
        obey(pipe, one)
        one.close()
