"""The kernel features that the lane uses, each tried: containers refuse what the kernel's version promises."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass


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
    except (OSError, ValueError, struct.error, Missing) as error:
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
