"""Real processes under real hardship: other users, limits, control groups, filtered system calls, empty mounts.

`run` calls a function in a fresh process and returns what it returned; `Child` talks to one. The function confines
itself first, with the functions below: a process cannot be let out of most of these again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import secrets
import signal
import socket
import struct
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest

from mmlane import host

P = ParamSpec("P")
T = TypeVar("T")

NOBODY = 65534
DEADLINE = 60.0  # seconds; only a fault takes that long

_libc = ctypes.CDLL(None, use_errno=True)
# A server that has imported torch forks the children: each is there at once, and shares no thread with the tests.
_processes = get_context("forkserver")
_processes.set_forkserver_preload(["torch", "hypothesis", "pytest", "mmlane.lane"])


def checked(result: int) -> int:
    """The result of a libc call. Raises OSError for -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- processes ---------------------------------------------------------------------------------------------


class Died(Exception):
    """A child ended without a word; `exitcode` is the negative number of the signal that killed it."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"exit code {exitcode}")
        self.exitcode = exitcode


class Failed(Exception):
    """A child raised; the text is its traceback."""


def live_no_longer_than_the_parent() -> None:
    """Die when it does; to be said again after a fork, and after a change of user."""
    checked(_libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG


def _body(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    live_no_longer_than_the_parent()
    try:
        result = function(pipe, *args)
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
        raise
    pipe.send(("returned", result))


class Child:
    """A process that runs `function(pipe, *args)`. What it sends over the pipe, `hear` returns."""

    def __init__(self, function: Callable[Concatenate[Connection, P], Any], *args: P.args, **_: P.kwargs) -> None:
        self.pipe, there = _processes.Pipe()
        self.process = _processes.Process(target=_body, args=(there, function, args), daemon=True)
        self.process.start()
        there.close()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def hear(self, timeout: float = DEADLINE) -> Any:
        """The next thing it says. Raises Died, Failed, TimeoutError."""
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"nothing heard for {timeout:g} s")
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(timeout)
            raise Died(self.process.exitcode) from None
        if isinstance(said, tuple) and len(said) == 2 and said[0] == "raised":
            raise Failed(said[1])
        return said

    def result(self, timeout: float = DEADLINE) -> Any:
        """What the function returned. Raises as `hear` does."""
        word, value = self.hear(timeout)
        assert word == "returned", (word, value)
        self.process.join(timeout)
        return value

    def say(self, what: object = None) -> None:
        """Send it something, by default only that it may go on."""
        self.pipe.send(what)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.join(DEADLINE)
        self.pipe.close()
        self.process.close()


def _alone(pipe: Connection, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(*args)


def run(function: Callable[P, T], *args: P.args, **_: P.kwargs) -> T:
    """Call a function in a process of its own. Raises Died, Failed, TimeoutError."""
    with Child(_alone, function, args) as child:
        value: T = child.result()
        return value


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll a condition for which there is no event."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about in {DEADLINE:g} s")
        time.sleep(0.01)


def descriptors() -> Counter[str]:
    """What the open descriptors of this process are."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found[str(entry.readlink())] += 1
    return found


@contextmanager
def in_a_thread(work: Callable[[], object]) -> Iterator[None]:
    """Run something beside the block; what it raises, comes out at the end of the block."""
    problems: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)
            raise

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the thread does not come to an end"
    for problem in problems:
        raise problem


# --- users -------------------------------------------------------------------------------------------------


def become(uid: int = NOBODY) -> None:
    """Be another user from now on."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    live_no_longer_than_the_parent()


@cache
def _becoming_fails() -> str:
    try:
        run(become)
    except Failed as failure:
        return str(failure).splitlines()[-1]
    return ""


def require_other_users() -> None:
    """Skip the test where a process cannot become another user."""
    problem = _becoming_fails()
    if problem:
        pytest.skip(f"this process cannot become another user (needs root): {problem}")


# --- limits ------------------------------------------------------------------------------------------------


def limit(what: int, value: int) -> int:
    """Set this process's soft limit; returns what it was."""
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    return before


def limit_address_space(more: int) -> None:
    """Let this process map that many bytes more, and no more."""
    limit(resource.RLIMIT_AS, memory_of_this_process("VmSize") + more)


def memory_of_this_process(field: str) -> int:
    """A size of this process from /proc, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)


def limit_descriptors(more: int) -> int:
    """Let this process open that many descriptors more; returns the limit before."""
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    while (filler := os.open(os.devnull, os.O_RDONLY)) < highest:
        pass
    os.close(filler)
    return limit(resource.RLIMIT_NOFILE, filler + more)


# --- memory control groups ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A memory control group of our own."""

    directory: Path
    version: int

    def enter(self) -> None:
        """Be in it from now on."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))

    def used(self) -> int:
        """Bytes charged to it."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.directory / name).read_text())

    def kills(self) -> int:
        """How many processes the kernel has killed in it for lack of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        lines = (line.split() for line in (self.directory / name).read_text().splitlines())
        return next(int(line[1]) for line in lines if line[0] == "oom_kill")


@contextmanager
def memory_group(nbytes: int) -> Iterator[Group]:
    """A memory control group with a limit, within this process's own. Skips the test where none can be made."""
    problem = "no memory control group in sight"
    for above, limit_file, _ in host._memory_groups(Path("/proc/self")):
        version = 1 if limit_file == "memory.limit_in_bytes" else 2
        directory = above / f"mmlane-test-{secrets.token_hex(6)}"
        try:
            if version == 2 and "memory" not in (above / "cgroup.subtree_control").read_text().split():
                continue
            directory.mkdir()
        except OSError as error:
            problem = str(error)
            continue
        try:
            (directory / limit_file).write_text(str(nbytes))
            if (directory / "memory.swap.max").exists():
                (directory / "memory.swap.max").write_text("0")
            yield Group(directory, version)
        finally:
            wait_until(partial(_removed, directory), "the removal of a control group")
        return
    pytest.skip(f"no memory control group can be made here: {problem}")


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


# --- mounts ------------------------------------------------------------------------------------------------

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def mount_over(place: str, options: str, source: str = "mmlane-test") -> None:
    """Put an empty tmpfs over a directory, for this process only; it must have no other thread yet."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWNS) == -1:
        checked(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    checked(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    checked(_libc.mount(source.encode(), place.encode(), b"tmpfs", 0, options.encode()))


@cache
def _mounting_fails() -> str:
    try:
        run(mount_over, "/dev/shm", "size=64m")
    except Failed as failure:
        return str(failure).splitlines()[-1]
    return ""


def require_mounts() -> None:
    """Skip the test where a process cannot have mounts of its own."""
    problem = _mounting_fails()
    if problem:
        pytest.skip(f"no mounts of one's own here (needs root, or user namespaces): {problem}")


# --- system calls ------------------------------------------------------------------------------------------

_NUMBERS = {
    "x86_64": {
        "fcntl": 72,
        "madvise": 28,
        "fallocate": 285,
        "eventfd2": 290,
        "socket": 41,
        "memfd_create": 319,
        "epoll_create1": 291,
    },
    "aarch64": {
        "fcntl": 25,
        "madvise": 233,
        "fallocate": 47,
        "eventfd2": 19,
        "socket": 198,
        "memfd_create": 279,
        "epoll_create1": 20,
    },
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data


@dataclass(frozen=True)
class Deny:
    """A system call that fails with an error; `values`: only if argument number `argument` is one of these."""

    call: str
    error: int
    argument: int = 0
    values: tuple[int, ...] = ()


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _assemble(denials: tuple[Deny, ...]) -> bytes:
    def instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, jump_true, jump_false, k)

    machine = platform.machine()
    code = [
        instruction(_LOAD, _ARCH_AT),
        instruction(_IF_EQUAL, _AUDIT[machine], 1, 0),
        instruction(_RETURN, _ALLOW),
    ]
    for denial in denials:
        answer = instruction(_RETURN, _ERRNO | denial.error)
        block = [answer]
        if denial.values:  # the lower half of the argument, then for each value: equal? answer
            block = [instruction(_LOAD, _ARGUMENTS_AT + 8 * denial.argument)]
            for value in denial.values:
                block += [instruction(_IF_EQUAL, value, 0, 1), answer]
        code.append(instruction(_LOAD, _NUMBER_AT))
        code.append(instruction(_IF_EQUAL, _NUMBERS[machine][denial.call], 0, len(block)))
        code += block
    code.append(instruction(_RETURN, _ALLOW))
    return b"".join(code)


def forbid(*denials: Deny) -> None:
    """Have the kernel refuse these system calls to this thread and to all that it starts."""
    code = _assemble(denials)
    program = _Program(len(code) // 8, code)
    checked(_libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    checked(_libc.prctl(22, 2, ctypes.byref(program), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@cache
def _filtering_fails() -> str:
    if platform.machine() not in _NUMBERS:
        return f"no system call numbers for {platform.machine()}"
    try:
        refused = run(_try_filter)
    except Failed as failure:
        return str(failure).splitlines()[-1]
    return "" if refused else "the filter has no effect"


def _try_filter() -> bool:
    forbid(Deny("memfd_create", errno.EXDEV))
    try:
        os.close(os.memfd_create("x"))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def require_filters() -> None:
    """Skip the test where system calls cannot be filtered."""
    problem = _filtering_fails()
    if problem:
        pytest.skip(f"system calls cannot be filtered here (seccomp): {problem}")


# --- raw peers ---------------------------------------------------------------------------------------------


def visit(address: str) -> socket.socket:
    """A bare connection to a lane."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{address}")
    connection.settimeout(DEADLINE)
    return connection


def listen(address: str) -> socket.socket:
    """A bare listener where a lane would be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(DEADLINE)
    listener.bind(f"\0{address}")
    listener.listen(4)
    return listener


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it; an end, be it a reset, is an empty message."""
    try:
        message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 16)
    except ConnectionResetError:
        return b"", []
    return message, fds
