"""A function in a process of its own, and all that can be done to a process.

    with Child(function, 1, 2) as child:  # runs function(pipe, 1, 2)
        assert child.hear() == "what the function sent"
        child.say("go on")
        assert child.result() == "what it returned"

`run` is a child that is not talked to. What raises in a child raises Failed here; a child that ends without a word
raises Died.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from tests.forkserver import FORKED
from tests.lane.harness import kernel
from tests.lane.harness.libc import checked, libc
from tests.lane.harness.waiting import DEADLINE, eventually

P = ParamSpec("P")
T = TypeVar("T")


def start_server() -> None:
    """Have the server, and what else multiprocessing starts for it, before a test counts its descriptors."""
    forkserver.ensure_running()


def pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Two ends, of which a child can have one. Not duplex: the first one only receives."""
    ours, theirs = FORKED.Pipe(duplex)
    return ours, theirs


class Died(Exception):
    """A process ended without a word. `exitcode`: minus the signal's number, if a signal ended it."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"exit code {exitcode}")
        self.exitcode = exitcode


class Failed(Exception):
    """A process raised an exception that its test does not expect; the text is its traceback."""


def die_with_the_parent() -> None:
    """Have this process killed when its parent ends; to be said again after a fork, and after a change of user."""
    checked(libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG


def _live(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    die_with_the_parent()
    try:
        result = function(pipe, *args)
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        raise
    pipe.send(("returned", result))


class Child:
    """A process that runs `function(pipe, *args)`. What it sends over the pipe, `hear` returns."""

    def __init__(self, function: Callable[Concatenate[Connection, P], Any], *args: P.args, **_: P.kwargs) -> None:
        self._pipe, there = pipe()
        self._process = FORKED.Process(target=_live, args=(there, function, args))
        self._process.start()
        there.close()
        pid = self._process.pid
        assert pid is not None
        self.pid = pid

    # --- talking -------------------------------------------------------------------------------------------

    def say(self, what: object = None) -> None:
        """Send it something, by default only that it may go on. Raises Died."""
        try:
            self._pipe.send(what)
        except BrokenPipeError:
            raise Died(self.exitcode()) from None

    def hear(self) -> Any:
        """The next thing it says. Raises Died, Failed, TimeoutError."""
        if not self._pipe.poll(DEADLINE):
            raise TimeoutError(f"process {self.pid} says nothing for {DEADLINE:g} s")
        try:
            said = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise Died(self.exitcode()) from None
        if isinstance(said, tuple) and len(said) == 2 and said[0] == "failed":
            raise Failed(said[1])
        return said

    def result(self) -> Any:
        """What the function returned, now that it has ended. Raises as `hear` does."""
        word, value = self.hear()
        assert word == "returned", (word, value)
        self.exitcode()
        return value

    # --- life and death ------------------------------------------------------------------------------------

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def exitcode(self) -> int | None:
        """Wait for its end: minus the signal's number, if a signal ended it."""
        self._process.join(DEADLINE)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        assert self.exitcode() == -signal.SIGKILL

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Wait until all its threads have stopped."""
        eventually(lambda: set(kernel.thread_states(self.pid).values()) == {"T"}, f"process {self.pid} stops")

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def put_down(self) -> None:
        """Whatever state it is in, have it gone, and this end closed."""
        self._process.kill()
        self._process.join(DEADLINE)
        self._pipe.close()
        self._process.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.put_down()


def _alone(pipe: Connection, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(*args)


def run(function: Callable[P, T], *args: P.args, **_: P.kwargs) -> T:
    """Call a function in a process of its own. Raises Died, also after an answer, Failed, and TimeoutError."""
    with Child(_alone, function, args) as child:
        value: T = child.result()
        if child.exitcode() != 0:
            raise Died(child.exitcode())
        return value
