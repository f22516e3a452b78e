"""The benchmark's end of one way's processes: starts them, gives orders, ends them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from bench.harness.machine import CHECKOUT
from bench.transport.ways import Way
from devkit.sharedmemory import can_be_private, privately
from mmlane.bench.workers import Failed, Refusal, Worker

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
    "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugin'}",  # an engine's environment has neither
}


@dataclass(frozen=True)
class Setting:
    """What all are started with."""

    readers: int
    threads: int
    scratch: Path


def shared_memory_room() -> int:
    """Bytes that a team can have in /dev/shm."""
    if can_be_private():
        return _machine_memory()
    found = os.statvfs("/dev/shm")
    return found.f_bavail * found.f_frsize


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Team(Worker):
    """One way's producer, which obeys, and its readers. After Failed or Refusal they are gone, and can be launched
    again."""

    def __init__(self, way: Way, setting: Setting) -> None:
        self.way = way
        self.torch = ""
        self._setting = setting
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = setting.scratch / way.label.replace(" ", "-")
        self._log = self._directory / "log"

    @property
    def running(self) -> bool:
        return self._process is not None

    def launch(self) -> None:
        """Start the processes; `wait` says when they are ready."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = Pipe()
        command = [
            str(self.way.python()), "-m", "bench.transport.worker",
            "--orders", str(theirs.fileno()), "--parent", str(os.getpid()), "--module", self.way.module,
            *(["--mode", self.way.mode] if self.way.mode else []),
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
                cwd=CHECKOUT,
                env=inherited | _ENVIRONMENT,
                start_new_session=True,
            )
        theirs.close()

    def wait(self) -> None:
        """Wait for launched processes. Raises Failed."""
        self.torch = self.answer(_START_S)

    def answer(self, patience_s: float = _ANSWER_S) -> Any:
        try:
            return super().answer(patience_s)
        except (Failed, Refusal):
            self.end()
            raise

    def end(self) -> None:
        if self._process is None:
            return
        self._pipe.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            # Its readers end with it, whatever they are at.
            self._process.kill()
            self._process.wait()
        self._process = None

    def trace(self) -> str:
        return self._log.read_text(errors="replace").strip()[-_LOG_END:]
