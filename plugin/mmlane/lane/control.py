"""The producer's control thread: lets readers in, notices their end, and does what the lane leaves to it.

It sleeps unless a process connects, a member ends, the lane has work for it, or a look is due. Releases do not
wake it: they wait in the members' sockets until the producer drains them.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mmlane.lane import failpoints, protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.errors import needed
from mmlane.lane.fork import close_in_child
from mmlane.lane.peer import has_ended, peer_of, shares_pid_namespace, uid_is_proof
from mmlane.lane.protocol import ProtocolError

if TYPE_CHECKING:
    from mmlane.lane.invitation import Invitation
    from mmlane.lane.producer import Lane

logger = logging.getLogger("mmlane.lane")

_UNPROVEN = 64  # connections at a time that have not proven that they are readers
_PATIENCE = 2.0  # seconds they have for it
_REASONS = 16  # to log; a crowd must not fill the log
_REST = 0.02  # seconds without new connections after one was rejected
_AT_ONCE = 1024  # messages of one member to read in one go: more than fit into a socket
_SWITCHES = {protocol.STATUS: None, protocol.OFF: True, protocol.ON: False}


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


class Control:
    """Sockets and thread of one lane, whose methods the thread calls without the lane's lock.

    invitation: whose name to listen at, in the abstract namespace. memory: bytes, slots and path, which a reader
    is told. descriptor: which it is given. period: seconds between looks while there is something to look after.
    Raises OSError when the name cannot be had.
    """

    def __init__(
        self, lane: Lane, invitation: Invitation, memory: tuple[int, int, str], descriptor: int, period: float
    ) -> None:
        self._lane = lane
        self._invitation = invitation
        self._memory = memory
        self._descriptor = descriptor
        self._period = period
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._members: dict[int, tuple[Member, socket.socket]] = {}  # those that have joined
        self._next_look: float | None = None
        self._resting_until: float | None = None
        self._stop = self._has_work = False
        self._listens = True
        self.rejected = 0
        self._reasons: set[str] = set()  # those that were logged
        with ExitStack() as scope:  # closes what there is, should the rest not be had
            with needed("a Unix socket in the abstract namespace"):
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
                self._listener = scope.enter_context(close_in_child(listener))
                self._listener.bind(f"\0{invitation.name}")
                self._listener.listen(_UNPROVEN)
                self._listener.setblocking(False)
            with needed("epoll"):
                self._events = scope.enter_context(select.epoll())  # what wakes the thread
                self._events.register(self._listener, select.EPOLLIN)
                self._inbox = scope.enter_context(select.epoll())  # what `received` reads
            with needed("eventfd"):
                self._wakeup = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                self._events.register(self._wakeup.fd, select.EPOLLIN)
            scope.pop_all()
        self._thread = threading.Thread(target=self._run, name=invitation.name, daemon=True)

    def start(self) -> None:
        """Let readers in from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end; its sockets are closed by then."""
        self._stop = True
        self.wake()

    def join(self) -> None:
        """Wait for the thread's end, unless this is the thread."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Close all sockets: at the end, and in a forked child, where they would hide the parent's death."""
        self._listener.close()
        for one in list(self._connections.values()):
            one.socket.close()
        self._events.close()
        self._inbox.close()

    # --- called with the lane's lock held ------------------------------------------------------------------

    def received(self, limit: int | None = None) -> Iterable[tuple[Member, bytes]]:
        """What members have written, in the order of each; stops after `limit` messages.

        A member's end is not told here: that wakes the thread.
        """
        heard = 0
        for number, _ in self._inbox.poll(0):
            member, connection = self._members[number]
            for _ in range(_AT_ONCE):  # what it writes during this waits for the next time
                if limit is not None and heard >= limit:
                    return
                try:
                    message = connection.recv(protocol.LIMIT, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except ConnectionResetError:  # it ended with messages unread; its own last ones are still here
                    continue
                if not message and has_ended(connection):
                    self._inbox.unregister(connection)
                    break
                heard += 1
                yield member, message or b"\0"  # an empty message only looks like an end

    def watch(self) -> None:
        """There is something to look after: look once a period, until `rest`."""
        if self._next_look is None:
            self._next_look = time.monotonic() + self._period
            self.wake()

    def rest(self) -> None:
        """There is nothing to look after any more."""
        self._next_look = None

    # --- called by all threads -----------------------------------------------------------------------------

    def has_work(self) -> None:
        """Have the thread call `work`."""
        if not self._has_work:
            self._has_work = True
            self.wake()

    def wake(self) -> None:
        """Have the thread take a turn."""
        os.eventfd_write(self._wakeup.fd, 1)

    # --- called by the thread ------------------------------------------------------------------------------

    def send(self, kind: int, items: Sequence[tuple[int, int]], member: Member) -> bool:
        """Send pairs to a member; False when it is too far behind to get them now, or gone."""
        for other, connection in list(self._members.values()):
            if other != member:
                continue
            try:
                for at in range(0, len(items), protocol.PAIRS):
                    connection.send(protocol.pairs(kind, items[at : at + protocol.PAIRS]), protocol.QUIETLY)
            except OSError:
                return False
            return True
        return False

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            while not self._stop:
                self._turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, the lane ends, and says so last
            failure = error
        finally:
            try:
                self._lane.ended(f"the lane's control thread has failed: {failure!r}")
            finally:
                self.abandon()
        if failure is not None:
            logger.error("lane %s is closed: its control thread has failed", self._thread.name, exc_info=failure)
        self._lane.work()

    def _turn(self) -> None:
        deadlines = [one.deadline for one in self._connections.values() if one.member is None]
        deadlines += [at for at in (self._next_look, self._resting_until) if at is not None]
        timeout = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
        for number, _ in self._events.poll(0.0 if self._has_work else timeout):
            if number == self._listener.fileno():
                self._accept()
            elif number == self._wakeup.fd:
                os.eventfd_read(number)
            elif (one := self._connections.get(number)) is None:
                continue  # dropped in this very turn
            elif one.joined:  # a member wakes this thread by its end alone
                self._drop(number)
            else:
                self._hear(number)
        now = time.monotonic()
        for number, one in list(self._connections.items()):
            if one.member is None and one.deadline <= now:
                self._reject(number, f"nothing heard for {_PATIENCE:g} s")
        if self._resting_until is not None and self._resting_until <= now:
            self._resting_until = None
        self._listen()
        if self._has_work:
            self._has_work = False
            if self._lane.work():
                self._has_work = True
        if self._next_look is not None and self._next_look <= now:
            self._next_look = now + self._period
            self._lane.look()

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
                self._join(number, one, one.member)
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
        if not protocol.is_proven(hello, self._invitation.secret):
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
        if self._stop:
            raise ProtocolError("this lane is closed")
        one.member = member
        message = protocol.welcome(self._invitation.secret, hello.nonce, *self._memory)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [self._descriptor]))
        one.socket.sendmsg([message], [rights], protocol.QUIETLY)  # not socket.send_fds, which ignores the flags
        failpoints.reached("accept.welcomed")

    def _join(self, number: int, one: _Connection, member: Member) -> None:
        self._events.modify(one.socket, select.EPOLLRDHUP)  # from now on only its end wakes the thread
        one.joined = True
        with self._lane.lock:
            self._members[number] = member, one.socket
            self._inbox.register(one.socket, select.EPOLLIN | select.EPOLLRDHUP)
        self._lane.joined(member)
        failpoints.reached("accept.joined")

    def _answer(self, number: int, one: _Connection, off: bool | None) -> None:
        if not uid_is_proof():
            raise ProtocolError("it runs as the overflow user, so that nobody can prove to be of the same user")
        if off is not None:
            if not shares_pid_namespace(peer_of(one.socket).pid):
                raise ProtocolError("only from its own container can it be switched off or on")
            self._lane.switch(off)
        one.socket.send(protocol.status(asdict(self._lane.stats())), protocol.QUIETLY)
        self._drop(number)
        self._rest_for(_REST)

    def _reject(self, number: int, reason: str, level: int = logging.INFO) -> None:
        self.rejected += 1
        if level == logging.INFO:  # a stranger's
            if reason in self._reasons or len(self._reasons) >= _REASONS:  # `rejected` counts the rest
                level = logging.DEBUG
            else:
                self._reasons.add(reason)
        logger.log(level, "lane %s rejected a process: %s", self._invitation.name, reason)
        with suppress(OSError):  # gone already
            self._connections[number].socket.send(protocol.reject(reason), protocol.QUIETLY)
        self._drop(number)
        self._rest_for(_REST)

    def _drop(self, number: int) -> None:
        """A connection is over."""
        one = self._connections.pop(number)
        self._events.unregister(one.socket)
        if one.joined and one.member is not None:
            self._lane.left(one.member)
        with self._lane.lock:  # nobody reads from it
            if self._members.pop(number, None) is not None:
                with suppress(FileNotFoundError):  # its end was seen
                    self._inbox.unregister(one.socket)  # a child that is being forked may have it still open
            one.socket.close()

    def _rest_for(self, seconds: float) -> None:
        """Accept nobody for a moment, so that processes that come in masses cost the producer little."""
        self._resting_until = max(self._resting_until or 0.0, time.monotonic() + seconds)
