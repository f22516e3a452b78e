"""The program of a fork server; see fork_server.py. Standard library only: it runs with any environment's Python.

    PYTHON fork_server_main.py SOCKET MODULE...

It imports the modules. Then it forks a process for each order that comes over the socket with that number, and
that process runs the order's script. A second socket comes with every order: the exit status goes back over it,
and when the client shuts it, the script's processes are killed. The server ends when the client closes the first.

A forked process has only the thread that forked, and locks that other threads held stay locked: so the server
refuses to fork when it has more than one thread.

What a module read from the environment while it was imported holds for all scripts. An order is refused when its
environment has another value for such a variable. Not seen is what code in C reads, what is read while the
interpreter itself starts, and a walk through all variables that looks for names of some form.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LARGEST_ORDER = 1 << 20
_READ_AT_START = "MMLANE"  # variables that mmlane's .pth file may have read when the interpreter started
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


@dataclass(frozen=True)
class Order:
    """What to run, and where its output goes. `mounts`: the options of a fresh tmpfs, by place."""

    argv: list[str]
    env: dict[str, str]
    read_again: list[str]
    mounts: dict[str, str]
    stdout: int
    stderr: int
    reply: socket.socket

    @classmethod
    def receive(cls, orders: socket.socket) -> Order | None:
        """The next order; None when there will be no more."""
        message, (*fds,), _, _ = socket.recv_fds(orders, _LARGEST_ORDER, 3)
        if not message:
            return None
        stdout, stderr, reply = fds
        return cls(**json.loads(message), stdout=stdout, stderr=stderr, reply=socket.socket(fileno=reply))

    def changed(self, before: Mapping[str, str]) -> set[str]:
        """The variables that this order wants to be otherwise than they were when the server started."""
        return {name for name in {*before, *self.env} if self.env.get(name) != before.get(name)}

    def close(self) -> None:
        os.close(self.stdout)
        os.close(self.stderr)
        self.reply.close()


@dataclass(frozen=True)
class Child:
    """A process that runs an order. `ended` is a pidfd: it becomes readable when the process has ended."""

    pid: int
    ended: int
    reply: socket.socket

    def kill(self) -> None:
        """Kill it and what it has forked."""
        os.killpg(self.pid, signal.SIGKILL)

    def forget(self) -> None:
        os.close(self.ended)
        self.reply.close()


class Server:
    """Waits for orders, for the end of children, and for clients that give up."""

    def __init__(self, orders: socket.socket, before: Mapping[str, str], read: set[str]) -> None:
        self._orders, self._before, self._read = orders, before, read
        self._selector = selectors.DefaultSelector()
        self._selector.register(orders, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}

    def serve(self) -> Order | None:
        """Returns None in the server, when there are no more orders, and in each child the order to run."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._orders:
                    order = Order.receive(self._orders)
                    if order is None:
                        self._end()
                        return None
                    if self._accept(order):
                        return order
                elif key.data in self._children:
                    self._attend(key.fileobj, self._children[key.data])

    def _accept(self, order: Order) -> bool:
        """Fork a child for an order; True in the child."""
        too_late = {
            name
            for name in order.changed(self._before)
            if (name in self._read and name not in order.read_again) or name.startswith(_READ_AT_START)
        }
        if too_late:
            _reply(order.reply, refused=f"read before the fork: {', '.join(sorted(too_late))}")
            order.close()
            return False
        refuse_threads()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            end_with(server)
            self._forget_all()
            return True
        os.setpgid(pid, pid)  # here, too: either may come first
        os.close(order.stdout)
        os.close(order.stderr)
        child = self._children[pid] = Child(pid, os.pidfd_open(pid), order.reply)
        self._selector.register(child.ended, selectors.EVENT_READ, pid)
        self._selector.register(child.reply, selectors.EVENT_READ, pid)
        return False

    def _attend(self, what: Any, child: Child) -> None:
        if what is child.reply:  # nothing is ever sent: the client has shut it
            self._selector.unregister(child.reply)
            child.kill()
            return
        child.kill()  # what it has forked and left
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.ended)
        if child.reply in self._selector.get_map():
            self._selector.unregister(child.reply)
        del self._children[child.pid]
        _reply(child.reply, returncode=os.waitstatus_to_exitcode(status))
        child.forget()

    def _end(self) -> None:
        for child in self._children.values():
            child.kill()
            os.waitpid(child.pid, 0)
        self._forget_all()

    def _forget_all(self) -> None:
        """Close what belongs to the server alone."""
        for child in self._children.values():
            child.forget()
        self._selector.close()
        self._orders.close()


def _reply(reply: socket.socket, **answer: Any) -> None:
    try:
        reply.send(json.dumps(answer).encode())
    except BrokenPipeError:
        print("the client did not wait for:", answer, file=sys.stderr, flush=True)


def refuse_threads() -> None:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len(names) > 1:
        raise SystemExit(f"wanted one thread before a fork, found {len(names)}: {', '.join(names)}")


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before that
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def variables_read() -> Iterator[set[str]]:
    """The names of the variables that are looked up in `os.environ` while this context lasts."""
    read: set[str] = set()
    environ: Any = type(os.environ)
    get = environ.__getitem__

    def get_and_note(self: Any, name: str) -> Any:
        read.add(name)
        return get(self, name)

    environ.__getitem__ = get_and_note
    try:
        yield read
    finally:
        environ.__getitem__ = get


def run(order: Order, before: Mapping[str, str]) -> None:
    """Run the order's script in this forked process as if the process had been started for it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (order.stdout, 1), (order.stderr, 2)):
        os.dup2(source, target)
    os.close(nothing)
    order.close()
    for name in order.changed(before):  # what modules have set stays
        os.environ.pop(name, None)
        if name in order.env:
            os.environ[name] = order.env[name]
    tempfile.tempdir = None  # it is chosen by the environment, once
    script = Path(order.argv[0])
    code = compile(script.read_bytes(), script, "exec")  # now: a mount may hide the file
    if order.mounts:
        mount(order.mounts)
    sys.argv[:] = order.argv
    sys.path.insert(0, str(script.parent))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = str(script)
    exec(code, vars(main))


def mount(places: Mapping[str, str]) -> None:
    """Give this process a mount namespace of its own, with a fresh tmpfs in each place."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(failed: int, what: str) -> None:
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), what)

    check(libc.unshare(_CLONE_NEWNS), "unshare")
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "/")
    for place, options in places.items():
        check(libc.mount(b"tmpfs", place.encode(), b"tmpfs", ctypes.c_ulong(0), options.encode()), place)


def main() -> None:
    _, number, *modules = sys.argv
    del sys.path[0]  # this file's directory, which no script has
    before = dict(os.environ)
    gc.disable()
    with variables_read() as read:
        for module in modules:
            importlib.import_module(module)
    # What has been imported is no garbage: no collection needs to look through it, nor to copy its pages for that.
    gc.freeze()
    gc.enable()
    sys.stdout.flush()
    order = Server(socket.socket(fileno=int(number)), before, read).serve()
    if order is not None:
        run(order, before)


if __name__ == "__main__":
    main()
