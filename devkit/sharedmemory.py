"""A private /dev/shm for one server, and a look at what is in it, also after the server is dead.

With the privilege to do so, each server runs in a mount namespace of its own with a fresh tmpfs there:
runs do not see each other's segments, and the size can be set (Docker's default is 64 MiB). We keep the
directory open; that keeps the tmpfs, and what a killed engine left in it, until we close it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

_SHM = Path("/dev/shm")
_ENTER = 'mount -t tmpfs -o "size=$1,mode=1777" tmpfs /dev/shm && shift && exec "$@"'


@functools.cache
def can_be_private() -> bool:
    """Whether this process may make mount namespaces (in practice: root with CAP_SYS_ADMIN)."""
    trial = privately(["true"], 4096)
    try:
        return subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def privately(command: Sequence[str], size: int) -> list[str]:
    """The command line that runs `command`, under the same pid, with its own /dev/shm of that size."""
    return ["unshare", "--mount", "--", "sh", "-ec", _ENTER, "sh", str(size), *command]


class SharedMemory:
    """Lists one server's /dev/shm."""

    def __init__(self, directory: int, before: frozenset[str]) -> None:
        # Closed with this object at the latest: until then, leftovers take memory.
        self._closing = weakref.finalize(self, os.close, directory)
        # A way to it by path that holds after the mount has gone from every namespace.
        self._path = Path(f"/proc/self/fd/{directory}")
        self._before = before

    @classmethod
    def of_machine(cls) -> SharedMemory:
        """The machine's own, without what is in it now."""
        return cls(os.open(_SHM, os.O_RDONLY | os.O_DIRECTORY), frozenset(entry.name for entry in _SHM.iterdir()))

    @classmethod
    def of_process(cls, pid: int, alive: Callable[[], bool], timeout_s: float = 10.0) -> SharedMemory:
        """The private one of a process started with `privately`, as soon as it is mounted."""
        machines = _SHM.stat().st_dev
        deadline = time.monotonic() + timeout_s
        while alive() and time.monotonic() < deadline:
            try:
                directory = os.open(f"/proc/{pid}/root{_SHM}", os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            if os.fstat(directory).st_dev != machines:
                return cls(directory, frozenset())
            os.close(directory)
            time.sleep(0.002)
        raise RuntimeError(f"process {pid} did not mount its own {_SHM}")

    def listing(self) -> dict[str, int]:
        """Name and size in bytes of each file, semaphores of Python's multiprocessing included."""
        found = {}
        for entry in sorted(self._path.iterdir()):
            if entry.name in self._before:
                continue
            try:
                found[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # unlinked while we were looking
                continue
        return found

    def close(self) -> None:
        self._closing()
