"""What /proc says of processes and of the kernel. Mounts and control groups have modules of their own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mmlane.host.kernel_files import integer, number, text

PROC = Path("/proc")


def max_map_count() -> int | None:
    """How many mappings a process can have; None where the kernel does not tell."""
    return number(PROC / "sys/vm/max_map_count")


def overflow_uid() -> int:
    """The user id that stands for all users without one in this user namespace; 65534 by default."""
    uid = number(PROC / "sys/kernel/overflowuid")
    return 65534 if uid is None else uid


def pid_namespace() -> int | None:
    """The number of this process's pid namespace; None when it cannot be had."""
    try:
        return (PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return None


def lane_scope() -> str:
    """Where processes can share a lane, as a word: this start of the machine, and this network namespace."""
    try:
        network = (PROC / "self/ns/net").stat().st_ino
    except OSError:
        network = 0
    return f"{text(PROC / 'sys/kernel/random/boot_id').strip()}:{network}"


@dataclass(frozen=True)
class Process:
    """A process as its /proc/PID/stat tells: its command's name, its state, and its start in ticks since boot."""

    name: str
    state: str
    started: int


def process(pid: int, proc: Path = PROC) -> Process | None:
    """A process by its number; None when it is gone or hidden."""
    # The name, in parentheses, may itself hold spaces and parentheses.
    front, _, rest = text(proc / str(pid) / "stat").rpartition(")")
    fields = rest.split()
    started = integer(fields[19]) if len(fields) > 19 else None
    return None if started is None else Process(front.partition("(")[2], fields[0], started)


def is_alive(pid: int) -> bool:
    """Whether a process has this number in this pid namespace, perhaps one that has ended and is not reaped."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it exists, and belongs to another user
        return True
    return True


def pids(proc: Path = PROC) -> list[int] | None:
    """The processes in sight; None where that cannot be listed."""
    try:
        return [int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()]
    except OSError:
        return None


def status_numbers(pid: int | str, field: str, proc: Path = PROC) -> list[int]:
    """The numbers in a line of a /proc/PID/status, such as the four of `Uid`; empty when they cannot be had."""
    lines = text(proc / str(pid) / "status").split("\n")
    words = next((line.split()[1:] for line in lines if line.startswith(f"{field}:")), [])
    numbers = [integer(word) for word in words]
    return [] if None in numbers else [number for number in numbers if number is not None]


def has_mapped(pid: int, name: bytes, proc: Path = PROC) -> bool | None:
    """Whether a process has a file mapped whose name matches; None where that cannot be looked into.

    name: a regular expression for a part of it. A process that has ended has nothing mapped.
    """
    try:
        return re.search(name, (proc / str(pid) / "maps").read_bytes()) is not None
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None


def command_line(pid: int, proc: Path = PROC) -> str:
    """What a process calls itself, in one line; "" when it has ended, or is out of sight."""
    words = text(proc / str(pid) / "cmdline").replace("\0", " ").split()
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(words))
