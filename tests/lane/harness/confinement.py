"""Real hardship for a process: other users, limits, control groups, empty mounts, filtered system calls.

The function that `run` or a `Child` runs confines itself first, with what is here: a process cannot be let out of
most of these again. Where something cannot be had, `require_...` skips the test and says why.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from mmlane import host
from tests.lane.harness.child import Failed, die_with_the_parent, run
from tests.lane.harness.libc import checked, libc
from tests.lane.harness.waiting import eventually

OTHER_UID = 65534  # also the kernel's overflow uid

# --- users -------------------------------------------------------------------------------------------------


def become(uid: int = OTHER_UID) -> None:
    """Be another user from now on."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    die_with_the_parent()


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
    for above, limit_file, _ in host.memory_groups(Path("/proc/self")):
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
            eventually(partial(_removed, directory), "the removal of a control group")
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
    if libc.unshare(_CLONE_NEWNS) == -1:
        checked(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    checked(libc.mount(source.encode(), place.encode(), b"tmpfs", 0, options.encode()))


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
    checked(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    checked(libc.prctl(22, 2, ctypes.byref(program), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


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
