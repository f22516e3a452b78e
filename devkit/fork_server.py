"""Runs many Python scripts after one import of what they need: each in a process forked from one that has done it.

    with ForkServer(environment.python, ["torch"], env) as server:
        running = server.start([script, "word"], env=env)
        print(running.result(timeout_s=60).stdout)

The standard library's `multiprocessing.forkserver` does the same for functions of one's own program; this one does
it for scripts, with another environment's Python. fork_server_main.py tells what a forked process may rely on.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from devkit.server import dies_with_us

_PROGRAM = Path(__file__).with_name("fork_server_main.py")
_LARGEST_ANSWER = 1 << 16
_END_S = 30.0


class ForkServerDied(RuntimeError):
    """The server ended where it should not have; the message ends with its log."""


class ForkServer:
    """One process that has imported `modules` with the environment `env`. It ends when this process ends."""

    def __init__(self, python: Path, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        with theirs:
            self._process = subprocess.Popen(
                [*dies_with_us(), str(python), str(_PROGRAM), str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=env,
            )
        self.pid = self._process.pid
        self.close = weakref.finalize(self, _end, self._orders, self._process, self._log)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        read_again: Sequence[str] = (),
        mounts: Mapping[str, str] | None = None,
    ) -> Running:
        """Run a script (the first of the words) in a process of its own.

        Variables that the modules read while they were imported, and all of mmlane's, must be in `env` as they
        were in the server's, except for those that the script is known to read again. `mounts` gives the process
        a mount namespace of its own with a new tmpfs in each place: its options, by place.
        """
        order = {
            "argv": [str(word) for word in argv],
            "env": dict(env),
            "read_again": list(read_again),
            "mounts": dict(mounts or {}),
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by `result`
        with theirs:
            try:
                fds = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
                socket.send_fds(self._orders, [json.dumps(order).encode()], fds)
            except OSError as error:
                raise ForkServerDied(self.log()) from error
        return Running(self, order["argv"], ours, stdout, stderr)

    def log(self) -> str:
        """What the server itself has said, that is, the modules while they were imported."""
        return "" if self._log.closed else _text(self._log)


class Running:
    """A script that a fork server has been asked to run."""

    def __init__(
        self, server: ForkServer, argv: Any, reply: socket.socket, stdout: IO[bytes], stderr: IO[bytes]
    ) -> None:
        self._server, self._argv, self._reply = server, argv, reply
        self._stdout, self._stderr = stdout, stderr

    def result(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end. At the timeout it is killed with all that it has forked, and that is an error.

        Raises `TimedOut`, `ForkServerDied`, and `ValueError` where the server refused.
        """
        with self._reply, self._stdout, self._stderr:
            self._reply.settimeout(timeout_s)
            try:
                answer = self._answer()
            except TimeoutError:
                self._reply.shutdown(socket.SHUT_WR)
                self._reply.settimeout(None)
                self._answer()
                out, err = _text(self._stdout), _text(self._stderr)
                raise TimedOut(self._argv, timeout_s, out, err) from None
            if "refused" in answer:
                raise ValueError(f"{' '.join(self._argv)}: {answer['refused']}")
            return subprocess.CompletedProcess(
                self._argv, answer["returncode"], _text(self._stdout), _text(self._stderr)
            )

    def _answer(self) -> Any:
        message = self._reply.recv(_LARGEST_ANSWER)
        if not message:
            raise ForkServerDied(f"while it ran {' '.join(self._argv)}:\n{self._server.log()}")
        return json.loads(message)


class TimedOut(RuntimeError):
    """A script was killed because it ran for too long; the message ends with what it had said."""

    def __init__(self, argv: Sequence[str], timeout_s: float, out: str, err: str) -> None:
        super().__init__(f"{' '.join(argv)} ran for more than {timeout_s} s:\n{out[-2000:]}\n{err[-4000:]}")


def _text(file: IO[bytes]) -> str:
    # The writer has the same position in the file: leave it alone.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


def _end(orders: socket.socket, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    orders.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:  # it hangs in an import
        process.kill()
        process.wait()
    log.close()
