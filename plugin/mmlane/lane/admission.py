"""Processes that connect: readers that prove the right to join, and those that ask for the status or switch."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from array import array
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mmlane.lane import failpoints, protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.errors import needed
from mmlane.lane.fork import close_in_child
from mmlane.lane.peer import has_ended, peer_of, shares_pid_namespace, uid_is_proof
from mmlane.lane.protocol import ProtocolError

if TYPE_CHECKING:
    from mmlane.lane.inbox import Inbox
    from mmlane.lane.producer import Lane

logger = logging.getLogger("mmlane.lane")

_UNPROVEN = 64  # connections at a time that have not proven that they are readers
_PATIENCE = 2.0  # seconds they have for it
_REASONS = 16  # to log; a crowd must not fill the log
_REST = 0.02  # seconds without new connections after one was rejected
_SWITCHES = {protocol.STATUS: None, protocol.OFF: True, protocol.ON: False}


def listen(name: str, scope: ExitStack) -> socket.socket:
    """A socket that listens at a lane's name, in the abstract namespace; the scope closes it. Raises OSError."""
    with needed("a Unix socket in the abstract namespace"):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        scope.enter_context(close_in_child(listener))
        listener.bind(f"\0{name}")
        listener.listen(_UNPROVEN)
        listener.setblocking(False)
    return listener


@dataclass
class _Connection:
    """A process that has connected.

    deadline: by which it has to prove that it is a reader. member: the place that is kept for it once it has.
    joined: it has said MAPPED.
    """

    socket: socket.socket
    deadline: float
    member: Member | None = None
    joined: bool = False


class Admission:
    """The connections of one lane. The control thread calls it, without the lane's lock.

    memory: bytes, slots and path, which a reader is told. descriptor: which it is given. listener: whose name they
    connect to. events: what wakes the thread. inbox: for those that have joined.

    Attribute: `rejected`, how many processes were not let in.
    """

    def __init__(
        self,
        lane: Lane,
        memory: tuple[int, int, str],
        descriptor: int,
        listener: socket.socket,
        events: select.epoll,
        inbox: Inbox,
    ) -> None:
        self._lane = lane
        self._memory = memory
        self._descriptor = descriptor
        self._listener = listener
        self._events = events
        self._inbox = inbox
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._resting_until: float | None = None
        self._listens = True
        self._reasons: set[str] = set()  # those that were logged
        self.rejected = 0

    def deadlines(self) -> list[float]:
        """When to call `tidy` at the latest, even if nothing wakes the thread."""
        deadlines = [one.deadline for one in self._connections.values() if one.member is None]
        return deadlines if self._resting_until is None else [*deadlines, self._resting_until]

    def handle(self, number: int) -> None:
        """Something has happened to one of the sockets."""
        if number == self._listener.fileno():
            self._accept()
        elif (one := self._connections.get(number)) is None:
            return  # dropped in this very turn
        elif one.joined:  # a member wakes the thread by its end alone
            self._drop(number)
        else:
            self._hear(number)

    def tidy(self, now: float) -> None:
        """Reject those that have said nothing for too long, and listen again, or no more for now."""
        for number, one in list(self._connections.items()):
            if one.member is None and one.deadline <= now:
                self._reject(number, f"nothing heard for {_PATIENCE:g} s")
        if self._resting_until is not None and self._resting_until <= now:
            self._resting_until = None
        self._listen()

    def close(self) -> None:
        """Close all sockets."""
        self._listener.close()
        for one in list(self._connections.values()):
            one.socket.close()

    def _listen(self) -> None:
        """Accept the next process only if there is time for it, and room: till then it waits in the queue.

        It is not rejected there: a crowd that says nothing can delay a reader, but never keep it out.
        """
        unproven = sum(one.member is None for one in self._connections.values())
        listens = self._resting_until is None and unproven < _UNPROVEN
        if listens != self._listens:
            self._listens = listens
            self._events.modify(self._listener, select.EPOLLIN if listens else 0)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
            close_in_child(accepted)
            accepted.setblocking(False)
            self._events.register(accepted, select.EPOLLIN | select.EPOLLRDHUP)
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning(
                "a lane could not let a reader in (%s): trying again in a second; raise `ulimit -n`, or"
                " fs.epoll.max_user_watches",
                str(error),
            )
            self._rest_for(1.0)
            return
        failpoints.reached("accept.connected")
        number = accepted.fileno()
        self._connections[number] = _Connection(accepted, time.monotonic() + _PATIENCE)
        peer = peer_of(accepted)
        if uid_is_proof() and peer.uid != os.geteuid():
            self._reject(number, f"it belongs to user {os.geteuid()}, you are user {peer.uid}")
        elif not peer.pid:
            self._reject(number, "your process is in a PID namespace out of its sight: ask inside its container")

    def _hear(self, number: int) -> None:
        one = self._connections[number]
        try:
            message = one.socket.recv(protocol.LIMIT)
            kind = protocol.kind(message)
            if kind == protocol.HELLO and one.member is None:
                self._welcome(one, protocol.read_hello(message))
            elif kind == protocol.MAPPED and one.member is not None:
                self._join(one, one.member)
            elif kind in _SWITCHES and one.member is None:
                self._answer(number, one, _SWITCHES[kind])
            elif kind == protocol.REJECT and one.member is not None:
                self._reject(number, f"it could not join: {protocol.read_reject(message)}", logging.WARNING)
            else:
                raise ProtocolError(f"message {kind} was not expected")
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self._reject(number, str(error))

    def _welcome(self, one: _Connection, hello: protocol.Hello) -> None:
        if not protocol.is_proven(hello, self._lane.invitation.secret):
            raise ProtocolError("you do not know this lane's secret: only readers that it invited may join")
        member = Member(hello.group, hello.number)
        if member not in self._lane.members:
            expected = ", ".join(map(str, self._lane.members))
            raise ProtocolError(f"{member} is not expected here; these are: {expected}")
        failpoints.reached("accept.proven")
        for number, other in list(self._connections.items()):
            if other.member == member:
                if not has_ended(other.socket):
                    raise ProtocolError(f"{member} is here already, as process {peer_of(other.socket).pid}")
                self._drop(number)
        if self._lane.is_closed:
            raise ProtocolError("this lane is closed")
        one.member = member
        message = protocol.welcome(self._lane.invitation.secret, hello.nonce, *self._memory)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [self._descriptor]))
        one.socket.sendmsg([message], [rights], protocol.QUIETLY)  # not socket.send_fds, which ignores the flags
        failpoints.reached("accept.welcomed")

    def _join(self, one: _Connection, member: Member) -> None:
        self._events.modify(one.socket, select.EPOLLRDHUP)  # from now on only its end wakes the thread
        one.joined = True
        with self._lane.guard.lock:
            self._inbox.add(member, one.socket)
        self._lane.housekeeping.joined(member)
        failpoints.reached("accept.joined")

    def _answer(self, number: int, one: _Connection, off: bool | None) -> None:
        if not uid_is_proof():
            raise ProtocolError("it runs as the overflow user, so that no process can prove its user")
        if off is not None:
            if not shares_pid_namespace(peer_of(one.socket).pid):
                raise ProtocolError("only from its own container can it be switched off or on")
            self._lane.switch(off)
        one.socket.send(protocol.status(asdict(self._lane.stats())), protocol.QUIETLY)
        self._drop(number)
        self._rest_for(_REST)

    def _reject(self, number: int, reason: str, level: int = logging.INFO) -> None:
        self.rejected += 1
        if level == logging.INFO:  # of a process without the secret
            if reason in self._reasons or len(self._reasons) >= _REASONS:  # `rejected` counts the rest
                level = logging.DEBUG
            else:
                self._reasons.add(reason)
        logger.log(level, "lane %s rejected a process: %s", self._lane.name, reason)
        with suppress(OSError):  # gone already
            self._connections[number].socket.send(protocol.reject(reason), protocol.QUIETLY)
        self._drop(number)
        self._rest_for(_REST)

    def _drop(self, number: int) -> None:
        """A connection is over."""
        one = self._connections.pop(number)
        self._events.unregister(one.socket)
        if one.joined and one.member is not None:
            self._lane.housekeeping.left(one.member)
        with self._lane.guard.lock:  # no other thread reads from it
            self._inbox.remove(one.socket)
            one.socket.close()

    def _rest_for(self, seconds: float) -> None:
        """Accept no process for a moment, so that processes that come in masses cost the producer little."""
        self._resting_until = max(self._resting_until or 0.0, time.monotonic() + seconds)
