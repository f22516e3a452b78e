"""The benchmark's end of one peer's processes: starts them, gives orders, ends them."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from bench.transport.peers import Peer
from devkit.sharedmemory import can_be_private, privately

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 180.0  # an engine takes 15 s to import, on a busy machine more
_ANSWER_S = 120.0
_GRACE_S = 5.0
_LOG_END = 2000
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(_ROOT),
}


class Failed(RuntimeError):
    """A peer's processes ended, or did not answer: in one line, and then the end of their log."""


class Refusal(RuntimeError):
    """The peer says that it cannot do this case, and why."""


@dataclass(frozen=True)
class Setting:
    """What all peers are started with."""

    readers: int
    threads: int
    scratch: Path


def shared_memory_room() -> int:
    """Bytes that the peers can have in /dev/shm."""
    if can_be_private():
        return _machine_memory()
    found = os.statvfs("/dev/shm")
    return found.f_bavail * found.f_frsize


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Group:
    """One peer's producer and readers. After Failed or Refusal they are gone, and can be launched again."""

    def __init__(self, peer: Peer, setting: Setting) -> None:
        self.peer = peer
        self.torch = ""
        self._setting = setting
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = setting.scratch / peer.label.replace(" ", "-")
        self._log = self._directory / "log"

    @property
    def running(self) -> bool:
        return self._process is not None

    def launch(self) -> None:
        """Start the processes; `wait` says when they are ready."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._orders, theirs = Pipe()
        command = [
            str(self.peer.python()), "-m", "bench.transport.worker",
            "--orders", str(theirs.fileno()), "--parent", str(os.getpid()), "--module", self.peer.module,
            *(["--mode", self.peer.mode] if self.peer.mode else []),
            "--readers", str(self._setting.readers), "--threads", str(self._setting.threads),
            "--scratch", str(self._directory),
        ]  # fmt: skip
        if can_be_private():
            # Nothing is left behind then, however it ends. As large as the machine's memory: never the limit.
            command = privately(command, _machine_memory())
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SGLANG_", "MMLANE"))}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                cwd=_ROOT,
                env=inherited | _ENVIRONMENT,
                start_new_session=True,
            )
        theirs.close()

    def wait(self) -> None:
        """Wait for launched processes. Raises Failed."""
        self.torch = self._answer(_START_S)

    def order(self, name: str, **arguments: Any) -> Any:
        """Have it done, and return the result. Raises Failed, Refusal."""
        try:
            self._orders.send((name, arguments))
        except BrokenPipeError:
            raise self._failure("ended") from None
        return self._answer(_ANSWER_S)

    def stop(self) -> None:
        """End its processes, in an orderly way if possible."""
        if self._process is None:
            return
        self._orders.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            # Its readers end with it, whatever they are at.
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _answer(self, patience_s: float) -> Any:
        try:
            if not self._orders.poll(patience_s):
                raise self._failure(f"no answer in {patience_s:g} s")
            kind, result = self._orders.recv()
        except (EOFError, ConnectionResetError):
            raise self._failure("ended") from None
        if kind == "cannot":
            self.stop()
            raise Refusal(result)
        return result

    def _failure(self, what: str) -> Failed:
        self.stop()
        log = self._log.read_text(errors="replace").strip()
        *_, last = ["", *log.splitlines()]
        return Failed(f"{what}: {last}\n{log[-_LOG_END:]}")
