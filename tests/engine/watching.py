"""The server of all tests of the engine: what its processes send and what they take is compared at its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from devkit.client import Reply
from devkit.server import EngineServer, dies_with_us, free_port
from devkit.sharedmemory import can_be_private, privately
from tests.engine.digests import compare

PROBES = Path(__file__).with_name("probes")
HARMLESS = (signal.SIGSTOP, signal.SIGCONT, signal.SIGUSR2)


class WatchedServer(EngineServer):
    """An engine whose processes run probes: that of the digests, and those named (`probes/sitecustomize.py`).

    At its end every feature must have been taken by every rank as it was sent, and some must have been looked at
    if images were answered. A test that loses a feature on purpose says so with `loses`.
    """

    def __init__(
        self,
        version: str,
        *,
        probes: Sequence[str] = (),
        plugin: Path | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.notes = Path(self._directory.name)
        self._patched = plugin is not None or options.get("environment") is not None
        self._answered: list[int] = []
        self._losing = 0
        self._killed = False
        watching = {"PYTHONPATH": str(PROBES), "PROBES": " ".join(("digests", *probes)), "NOTES": str(self.notes)}
        super().__init__(version, plugin=plugin, env={**(env or {}), **watching}, **options)

    def __enter__(self) -> WatchedServer:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)
        if kind is None:
            self.verify()

    def verify(self) -> None:
        """Compare what has been sent so far with what was taken; nothing may be under way.

        A test that kills a process calls it before: afterwards less is known of what should have been taken.
        """
        # Without the plugin, n samples share their pointers below 0.5.13, and a fault may end the engine.
        undisturbed = self._patched and not self._killed
        compare(self.notes).verify(
            ranks=self.tp, answered=len(self._answered), losing=self._losing, undisturbed=undisturbed
        )

    def run(self, script: Path, *words: str) -> Any:
        """Run a script that has the engine in it, instead of starting a server; returns the JSON that it writes.

        It is given the file for that, the words, and the engine's arguments.
        """
        python, _, _, *arguments = self._command(free_port())
        output, log = self.notes / "output", self.notes / "log"
        command = [*dies_with_us(), python, str(script), str(output), *words, *arguments]
        if can_be_private():
            command = privately(command, 8 << 30)
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, env=self._environ(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(300)
            finally:
                with suppress(ProcessLookupError):  # its children have its group
                    os.killpg(process.pid, signal.SIGKILL)
        assert code == 0, log.read_text(errors="replace")[-6000:]
        return json.loads(output.read_text())

    def collectives(self) -> int:
        """How often ranks have waited for each other while they received; with the probe of that name."""
        return sum(len(file.read_text().splitlines()) for file in self.notes.glob("*.collectives"))

    # What it has been asked, and what has been done to it

    def generate(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        return self._counted(images, super().generate(images, text, **sampling))

    def chat(self, images: Sequence[bytes], text: str, **sampling: Any) -> Reply:
        return self._counted(images, super().chat(images, text, **sampling))

    def _counted(self, images: Sequence[bytes], reply: Reply) -> Reply:
        if images and reply.status == 200:
            self._answered.append(len(images))
        return reply

    def loses(self, features_of: int = 1) -> None:
        """A test is about to take the features of that many requests away."""
        self._losing += features_of

    def breaks(self) -> None:
        """A test is about to have a process of the engine end itself."""
        self._killed = True

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> None:
        self._killed |= sig not in HARMLESS
        super().kill(pid, sig)
