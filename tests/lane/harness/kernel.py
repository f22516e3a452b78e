"""What the kernel knows of lanes: who has their memory open or mapped, who listens, who runs and who was woken.

Only of the lanes and processes that are asked about: others on the machine may run lanes of their own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROC = Path("/proc")
SHM = Path("/dev/shm")
_MEMORY = "/memfd:mmlane"

# Directories and files in /proc vanish while they are looked at: a process that ends has nothing open any more.
# One that may not be looked into has another user or more rights than we, and was not started by us.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True)
class Trace:
    """Something of a lane that is there. pid: whose it is, 0 where that is not known."""

    kind: Literal["descriptor", "mapping", "socket", "file"]
    pid: int
    inode: int
    what: str


def traces(addresses: Iterable[str], files: Iterable[int], pids: Iterable[int] = ()) -> list[Trace]:
    """All there is of the lanes with these addresses and memory files, or of these makers in /dev/shm."""
    wanted = set(files)
    found = [*_sockets(set(addresses)), *_files(set(pids))]
    for pid in processes():
        found += [trace for trace in (*_descriptors(pid), *_mappings(pid)) if trace.inode in wanted]
    return found


def processes() -> list[int]:
    """All there are, those of others too."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


def lane_files(pid: int) -> set[int]:
    """The inodes of the lanes' memory that a process has open or mapped."""
    return {trace.inode for trace in (*_descriptors(pid), *_mappings(pid))}


def _descriptors(pid: int) -> Iterator[Trace]:
    try:
        files = list((PROC / str(pid) / "fd").iterdir())
    except _GONE:
        return
    for file in files:
        try:
            target = str(file.readlink())
            if target.startswith(_MEMORY):
                yield Trace("descriptor", pid, file.stat().st_ino, f"{file.name} -> {target}")
        except _GONE:
            continue


def _mappings(pid: int) -> Iterator[Trace]:
    try:
        text = (PROC / str(pid) / "maps").read_text(errors="replace")
    except _GONE:
        return
    for line in text.splitlines() if _MEMORY in text else ():
        place, access, _, _, inode, *name = line.split(maxsplit=5)
        if name and name[0].startswith(_MEMORY):
            yield Trace("mapping", pid, int(inode), f"{place} {access} {name[0]}")


def _sockets(addresses: set[str]) -> Iterator[Trace]:
    for line in (PROC / "net" / "unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith("@") and fields[7][1:] in addresses:
            yield Trace("socket", 0, int(fields[6]), line)


def _files(pids: set[int]) -> Iterator[Trace]:
    for file in SHM.iterdir():
        parts = file.name.replace("-", "_").split("_")
        if parts[0] == "mmlane" and len(parts) > 1 and parts[1].isdecimal() and int(parts[1]) in pids:
            yield Trace("file", int(parts[1]), file.stat().st_ino, str(file))


# --- memory ------------------------------------------------------------------------------------------------


def committed(pid: int, inode: int) -> int:
    """Bytes of memory behind a lane that a process has open."""
    for trace in _descriptors(pid):
        if trace.inode == inode:
            return (PROC / str(pid) / "fd" / trace.what.split()[0]).stat().st_blocks * 512
    raise LookupError(f"process {pid} does not have file {inode} open")


def blocks(fd: int) -> int:
    """Bytes of memory behind an open file."""
    return os.fstat(fd).st_blocks * 512


def in_page_tables(pid: int, inode: int) -> int:
    """Bytes of a lane in a process's page tables, through its shared mappings."""
    resident, inside = 0, False
    for line in (PROC / str(pid) / "smaps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            inside = len(fields) == 6 and fields[4] == str(inode) and fields[1].endswith("s")
        elif inside and fields[0] == "Rss:":
            resident += int(fields[1]) * 1024
    return resident


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open: number -> what it is."""
    found = {}
    for file in (PROC / str(pid) / "fd").iterdir():
        try:
            found[int(file.name)] = str(file.readlink())
        except _GONE:
            continue
    return found


def open_files() -> Counter[str]:
    """What this process has open, and how often."""
    return Counter(descriptors(os.getpid()).values())


def private_memory(pid: int) -> int:
    """Bytes of memory that are a process's alone."""
    return _status(PROC / str(pid))["RssAnon"] * 1024


def mappings(pid: int) -> int:
    """How many mappings a process has."""
    return len((PROC / str(pid) / "maps").read_text(errors="replace").splitlines())


# --- threads -----------------------------------------------------------------------------------------------


def thread_states(pid: int) -> dict[int, str]:
    """The letter for the state of each thread: R runs, S sleeps, T is stopped, ..."""
    states = {}
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            states[int(task.name)] = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except _GONE:
            continue
    return states


def sleeps(pid: int) -> dict[int, int]:
    """How often each thread has gone to sleep: once more than it was woken."""
    return {
        int(task.name): _status(task)["voluntary_ctxt_switches"] for task in (PROC / str(pid) / "task").iterdir()
    }


def _status(directory: Path) -> dict[str, int]:
    numbers = {}
    for line in (directory / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        first = value.split()[:1]
        if first and first[0].isdecimal():
            numbers[name] = int(first[0])
    return numbers
