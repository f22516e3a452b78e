"""What several commands of one container share: a pid namespace, its /proc, and a /dev/shm of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from devkit.sharedmemory import privately

_HOLD = "echo ready; exec cat"  # its first process: does nothing, and ends with us


class Container:
    """Runs commands in namespaces that nothing outside is seen from. Needs the right to make them.

        with Container() as container:
            subprocess.run(container.inside(["ps", "x"]))

    Leaving it kills everything in it. `shm` is its /dev/shm, seen from outside.
    """

    def __init__(self, shm_bytes: int = 1 << 30) -> None:
        self._shm_bytes = shm_bytes

    def __enter__(self) -> Container:
        isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--", "sh", "-c", _HOLD]
        self._process = subprocess.Popen(
            privately(isolated, self._shm_bytes), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise PermissionError("a container needs the right to make mount and pid namespaces")
        pid = self._process.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        self.shm = Path(f"/proc/{self.pid}/root/dev/shm")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in it, as a child of the process that is started."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--", *command]
