"""The comparison's end of one way's processes: starts them, gives orders, ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from mmlane.bench.ways import Way
from mmlane.bench.workers import Failed, Refusal, Worker

START_S = 300.0  # an engine takes 15 s to import, on a busy machine several times that
ANSWER_S = 120.0
_GRACE_S = 10.0
_LOG_END = 2000
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
    "MMLANE_LOG": "warning",
}


class Team(Worker):
    """One way's producer, which obeys, and its readers. After Failed or Refusal they are gone."""

    def __init__(self, way: Way, readers: int, scratch: Path) -> None:
        self.way = way
        self.notes: list[str] = []
        self._readers = readers
        self._directory = scratch / way.id
        self._log = self._directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def launch(self) -> None:
        """Start the processes; `wait` says when they are ready."""
        self._directory.mkdir(parents=True)
        self._pipe, theirs = Pipe()
        command = [
            sys.executable, "-m", "mmlane.bench.worker",
            "--orders", str(theirs.fileno()), "--parent", str(os.getpid()), "--module", self.way.module,
            *(["--mode", self.way.mode] if self.way.mode else []),
            "--readers", str(self._readers), "--scratch", str(self._directory),
        ]  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MMLANE")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=inherited | _ENVIRONMENT | {"MMLANE": self.way.mmlane},
                start_new_session=True,  # Ctrl-C is for the command, which ends them in order
            )
        theirs.close()

    def wait(self) -> None:
        """Wait for launched processes. Raises Failed."""
        self.notes = self.answer(START_S)
        self._is_ready = True

    def answer(self, patience_s: float = ANSWER_S) -> Any:
        try:
            return super().answer(patience_s)
        except (Failed, Refusal):
            self.end()
            raise

    def leave(self) -> None:
        """Have the processes end, without waiting: after what they are at, unless they have only just begun."""
        if self._process is not None:
            self._pipe.close()
            if not self._is_ready:
                self._process.kill()

    def end(self) -> None:
        if self._process is None:
            return
        self.leave()
        try:
            self._process.wait(_GRACE_S)
        except BaseException as error:
            # Its readers end with it, whatever they are at; what it has in /dev/shm is removed by its tracker.
            self._process.kill()
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self._process = None

    def trace(self) -> str:
        return self._log.read_text(errors="replace").strip()[-_LOG_END:]
