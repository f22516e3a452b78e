"""Facts about the machine, each looked up or tried on the spot: /dev/shm, memory limit, kernel features.

What /proc and the control groups say is read here and nowhere else. Reading it never raises, whatever is in the
files: what is not of the kernel's form, or cannot be read, counts as absent. Linux only; standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

SHM = Path("/dev/shm")

Kind = Literal["mmlane", "engine", "python"]

# What a shared-memory segment's name starts with, and whose it is. `psm_` is what Python's `shared_memory` gives a
# segment without a name: the engine's pointers below 0.5.15, and those of any other Python program.
PREFIXES: tuple[tuple[str, Kind], ...] = (("mmlane_", "mmlane"), ("sgl_shm_", "engine"), ("psm_", "python"))


# --- /dev/shm ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """One file in /dev/shm that carries features. `bytes` is the memory that it holds.

    `pid` is the maker's, where the name tells it; `alive` says whether the maker runs, None where that cannot be
    known. The engine's names tell no more than the pid, so there `alive` means that some process has that number
    in this pid namespace; ours tell the maker for certain.
    """

    name: str
    kind: Kind
    bytes: int
    pid: int | None
    alive: bool | None


@dataclass(frozen=True)
class SharedMemory:
    """A /dev/shm: its size and what is free in it, in bytes, and the segments that are in it."""

    path: Path
    total: int
    free: int
    writable: bool
    segments: tuple[Segment, ...]

    def abandoned(self) -> tuple[Segment, ...]:
        """The segments whose maker is gone."""
        return tuple(segment for segment in self.segments if segment.alive is False)


def shared_memory(path: Path = SHM) -> SharedMemory | None:
    """The machine's /dev/shm as it is now; None when there is none."""
    if not path.is_dir():
        return None
    system = os.statvfs(path)
    return SharedMemory(
        path=path,
        total=system.f_frsize * system.f_blocks,
        free=system.f_frsize * system.f_bavail,
        writable=os.access(path, os.W_OK | os.X_OK),
        segments=tuple(_segments(path)),
    )


def _segments(path: Path) -> Iterator[Segment]:
    for file in sorted(path.iterdir()):
        kind = next((kind for prefix, kind in PREFIXES if file.name.startswith(prefix)), None)
        if kind is None:
            continue
        try:
            found = file.lstat()  # any user can put a link there, to anything or nothing
        except FileNotFoundError:  # unlinked while we were looking
            continue
        if stat.S_ISREG(found.st_mode):
            yield Segment(file.name, kind, found.st_blocks * 512, *maker(file.name))


def maker(name: str) -> tuple[int | None, bool | None]:
    """Who made a segment, by its name: the pid, and whether that process runs; None where the name does not tell.

    Ours are `mmlane_PID_STARTTIME_PIDNAMESPACE_RANDOM`, the engine's `sgl_shm_KIND_PID_RANDOM`.
    """
    ours = re.fullmatch(r"mmlane_([1-9]\d*)_(\d+)_(\d+)_[0-9a-f]+", name)
    if ours is not None:
        pid, started, namespace = (int(number) for number in ours.groups())
        if namespace != pid_namespace():
            return pid, None
        holder = process(pid)
        return pid, is_alive(pid) and (holder is None or holder.started == started)
    engines = re.fullmatch(r"sgl_shm_\w+_([1-9]\d*)_[0-9a-f]+", name)
    if engines is not None:
        pid = int(engines.group(1))
        return pid, is_alive(pid)
    return None, None


def is_alive(pid: int) -> bool:
    """Whether a process has this number in this pid namespace."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists, and belongs to somebody else
        return True
    return True


# --- processes and mounts ----------------------------------------------------------------------------------


def max_map_count() -> int | None:
    """How many mappings a process can have; None where the kernel does not tell."""
    return _integer(_text(Path("/proc/sys/vm/max_map_count")).strip())


def overflow_uid() -> int:
    """The user id that stands for all users without one in this user namespace; 65534 by default."""
    uid = _integer(_text(Path("/proc/sys/kernel/overflowuid")).strip())
    return 65534 if uid is None else uid


def pid_namespace() -> int | None:
    """The number of this process's pid namespace; None when it cannot be had."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None


def lane_scope() -> str:
    """Where processes can share a lane, as a word: this start of the machine, and this network namespace."""
    try:
        network = Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        network = 0
    return f"{_text(Path('/proc/sys/kernel/random/boot_id')).strip()}:{network}"


@dataclass(frozen=True)
class Process:
    """A process as its /proc/PID/stat tells: its command's name, its state, and its start in ticks since boot."""

    name: str
    state: str
    started: int


def process(pid: int, proc: Path = Path("/proc")) -> Process | None:
    """A process by its number; None when it is gone or hidden."""
    # The name, in parentheses, may itself hold spaces and parentheses.
    front, _, rest = _text(proc / str(pid) / "stat").rpartition(")")
    fields = rest.split()
    started = _integer(fields[19]) if len(fields) > 19 else None
    return None if started is None else Process(front.partition("(")[2], fields[0], started)


@dataclass(frozen=True)
class Mount:
    """A line of /proc/PID/mountinfo: what is mounted (`device` is MAJOR:MINOR, `root` a path inside of it), where.

    `options` are those of the file system. Every text may be empty.
    """

    device: str
    root: str
    point: str
    kind: str
    options: str


def mounts(file: Path = Path("/proc/self/mountinfo")) -> tuple[Mount, ...]:
    """What is mounted in sight of a process, in the file's order."""
    found = (_mount(line) for line in _text(file).split("\n"))
    return tuple(mount for mount in found if mount is not None)


def _mount(line: str) -> Mount | None:
    """None for a line that is not of the kernel's form.

    A space stands between two fields, so one that is empty leaves two of them. Spaces inside are written \\040.
    """
    fields = line.split(" ")
    if "\\" in line:
        fields = [_unescaped(field) for field in fields]
    try:
        end = fields.index("-", 6)  # before it, there may be any number of optional fields
        kind, _, options = fields[end + 1 : end + 4]
    except ValueError:
        return None
    return Mount(fields[2], fields[3], fields[4], kind, options)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found[1], 8)), field)


def _text(file: Path) -> str:
    """What is in a file, of any bytes, as Python writes file names; "" when it cannot be read."""
    try:
        return os.fsdecode(file.read_bytes())
    except (OSError, ValueError):  # ValueError: no file has such a name
        return ""


def _integer(text: str) -> int | None:
    try:
        return int(text) if text.isdecimal() else None
    except ValueError:  # thousands of digits
        return None


# --- memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The machine's memory, and the tightest cgroup limit on this process and its use, in bytes; None: no limit.

    `available` is what may still be taken, from the machine and from each of its control groups, before somebody
    is killed for it; file caches that can be dropped count as available. What lies in /dev/shm or in a memfd is
    not such a cache.
    """

    total: int
    limit: int | None
    used: int | None
    available: int

    @property
    def bound(self) -> int:
        """What there is at most: the machine's, or the control group's."""
        return min(self.total, self.limit or self.total)

    def lane_capacity(self) -> int:
        """What a lane may hold unless somebody says otherwise: a quarter, in whole MiB."""
        return -(-(self.bound // 4) >> 20) << 20


def memory(proc: Path = Path("/proc/self"), meminfo: Path = Path("/proc/meminfo")) -> Memory:
    """Memory of the machine and the cgroup limit that holds for this process, of version 1 or 2.

    Where the machine does not say what is available, all of its memory is; a limit that cannot be had is none, and
    a use that cannot be had is nothing.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: list[tuple[int, int | None]] = []
    available = min(_fields(meminfo).get("MemAvailable:", total // 1024) * 1024, total)
    for directory, limit_file, use_file in _memory_groups(proc):
        limit = _number(directory / limit_file)
        if limit is not None and limit < total:  # version 1 writes "no limit" as a very large number
            used = _number(directory / use_file)
            found.append((limit, used))
            stat = _fields(directory / "memory.stat")
            prefix = "total_" if "total_inactive_file" in stat else ""
            cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            available = min(available, limit - (used or 0) + cache)
    limit, used = min(found, key=lambda pair: pair[0], default=(None, None))
    return Memory(total, limit, used, max(available, 0))


def _fields(file: Path) -> dict[str, int]:
    """The numbers in a file of lines `NAME NUMBER [UNIT]`."""
    lines = [line.split() for line in _text(file).split("\n")]
    found = {line[0]: _integer(line[1]) for line in lines if len(line) > 1}
    return {name: number for name, number in found.items() if number is not None}


def _memory_groups(proc: Path) -> Iterator[tuple[Path, str, str]]:
    """The directories of the cgroup with the memory controller, from this process's up to the topmost in sight."""
    lines = [line.split(":", 2) for line in _text(proc / "cgroup").split("\n")]
    groups = [line for line in lines if len(line) == 3]
    for mount in mounts(proc / "mountinfo"):
        if mount.kind == "cgroup2":
            names, mine = ("memory.max", "memory.current"), [path for number, _, path in groups if number == "0"]
        elif mount.kind == "cgroup" and "memory" in mount.options.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            mine = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
        else:
            continue
        top = Path(mount.point)
        for path in mine:
            directory = top / _inside(path, mount.root)
            for group in (directory, *directory.parents):
                yield group, *names
                if group == top:
                    break


def _inside(path: str, root: str) -> PurePosixPath:
    """A group's path from what is mounted on; that itself where the group is not in there."""
    here = PurePosixPath()
    try:
        inside = PurePosixPath(path).relative_to(root)
    except ValueError:
        return here
    return here if ".." in inside.parts else inside


def _number(file: Path) -> int | None:
    return _integer(_text(file).strip())


def room_problem(nbytes: int) -> str:
    """Why a file in memory of that size cannot be made and mapped here; "" when it can. Commits none of it.

    Also "" where there is no `memfd_create` to try it with, which `kernel_features` tells.
    """
    try:
        fd = os.memfd_create("mmlane-doctor", os.MFD_CLOEXEC)
    except (OSError, AttributeError):
        return ""
    try:
        os.ftruncate(fd, nbytes)
        mmap.mmap(fd, nbytes).close()
    except OSError as error:
        return error.strerror or str(error)
    except OverflowError:
        return "more bytes than this system can count"
    finally:
        os.close(fd)
    return ""


# --- kernel features ---------------------------------------------------------------------------------------


class Missing(Exception):
    """A kernel feature was tried and did not do what it should."""


@dataclass(frozen=True)
class Feature:
    """A feature of the kernel that the lane uses: what for, whether it worked when tried, and if not, why."""

    name: str
    purpose: str
    works: bool
    problem: str = ""


def kernel_features() -> tuple[Feature, ...]:
    """Every kernel feature that the lane will use, each tried for real on a page or two of memory."""
    return tuple(_tried(name, purpose, attempt) for name, (purpose, attempt) in _ATTEMPTS.items())


def _tried(name: str, purpose: str, attempt: Callable[[], None]) -> Feature:
    try:
        attempt()
    except AttributeError as error:
        return Feature(name, purpose, False, f"this Python was built without it ({error})")
    except (OSError, ValueError, Missing) as error:
        return Feature(name, purpose, False, str(error))
    return Feature(name, purpose, True)


def _memfd(scope: ExitStack, size: int = mmap.PAGESIZE) -> int:
    fd = os.memfd_create("mmlane-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    scope.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def _memfd_create() -> None:
    with ExitStack() as scope:
        fd = _memfd(scope)
        os.pwrite(fd, b"mmlane", 0)
        if os.pread(fd, 6, 0) != b"mmlane":
            raise Missing("what was written did not come back")


def _seals() -> None:
    with ExitStack() as scope:
        fd = _memfd(scope, 2 * mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
        except PermissionError:
            return
        raise Missing("a sealed memfd could be shrunk")


def _fallocate() -> None:
    with ExitStack() as scope:
        fd = _memfd(scope)
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        if os.fstat(fd).st_blocks == 0:
            raise Missing("posix_fallocate reserved nothing")


def _hole() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with ExitStack() as scope:
        fd = _memfd(scope)
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        if libc.fallocate(fd, 3, 0, mmap.PAGESIZE) != 0:  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if os.fstat(fd).st_blocks:
            raise Missing("the memory stayed")


def _read_only_descriptor() -> None:
    with ExitStack() as scope:
        fd = _memfd(scope)
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        scope.callback(os.close, reader)
        scope.enter_context(closing(mmap.mmap(reader, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)))
        try:
            writing = mmap.mmap(reader, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except PermissionError:
            return
        writing.close()
        raise Missing("a read-only descriptor could be mapped for writing")


def _connected(scope: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection over a socket in the abstract namespace."""
    listener = scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.settimeout(1.0)
    listener.bind(f"\0mmlane-doctor-{os.getpid()}-{os.urandom(4).hex()}")
    listener.listen(1)
    client = scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    client.settimeout(1.0)
    client.connect(listener.getsockname())
    server = scope.enter_context(listener.accept()[0])
    server.settimeout(1.0)
    return client, server


def _abstract_socket() -> None:
    with ExitStack() as scope:
        client, server = _connected(scope)
        client.send(b"one")
        client.send(b"two")
        if (server.recv(16), server.recv(16)) != (b"one", b"two"):
            raise Missing("messages did not keep their bounds")


def _peer_credentials() -> None:
    with ExitStack() as scope:
        _, server = _connected(scope)
        form = struct.Struct("3i")
        pid, uid, _ = form.unpack(server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
        if (pid, uid) != (os.getpid(), os.geteuid()):
            raise Missing(f"the peer is this process, {os.getpid()}, but was said to be {pid}")


def _descriptor_passing() -> None:
    with ExitStack() as scope:
        client, server = _connected(scope)
        fd = _memfd(scope)
        os.pwrite(fd, b"mmlane", 0)
        socket.send_fds(client, [b"x"], [fd])
        _, received, _, _ = socket.recv_fds(server, 16, 1)
        for copy in received:
            scope.callback(os.close, copy)
        if len(received) != 1 or os.pread(received[0], 6, 0) != b"mmlane":
            raise Missing("the descriptor that was sent did not arrive")


def _populate(advice: int) -> Callable[[], None]:
    def attempt() -> None:
        with ExitStack() as scope:
            fd = _memfd(scope)
            scope.enter_context(closing(mmap.mmap(fd, mmap.PAGESIZE))).madvise(advice)

    return attempt


_ATTEMPTS: dict[str, tuple[str, Callable[[], None]]] = {
    "memfd_create": ("feature memory without /dev/shm", _memfd_create),
    "F_ADD_SEALS": ("memory that cannot shrink under a reader", _seals),
    "posix_fallocate": ("full memory is an error, not a SIGBUS", _fallocate),
    "hole punching": ("idle memory goes back to the system", _hole),
    "read-only descriptor": ("readers cannot write features", _read_only_descriptor),
    "abstract socket": ("control, with nothing to clean up", _abstract_socket),
    "SO_PEERCRED": ("only processes of the same user", _peer_credentials),
    "SCM_RIGHTS": ("memory handed to readers", _descriptor_passing),
    # The numbers are the kernel's; Python names them from 3.14 on.
    "MADV_POPULATE_READ": ("readers without page faults (Linux 5.14)", _populate(22)),
    "MADV_POPULATE_WRITE": ("writers without page faults (Linux 5.14)", _populate(23)),
}
