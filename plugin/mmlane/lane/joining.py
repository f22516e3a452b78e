"""How a reader joins a lane: it connects to the producer, proves that it was invited, and maps the memory."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from mmlane.lane import failpoints, protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.descriptor import Descriptor, Received
from mmlane.lane.device import Device
from mmlane.lane.errors import JoinRefused, needed
from mmlane.lane.fork import close_in_child
from mmlane.lane.invitation import Invitation
from mmlane.lane.link import Link
from mmlane.lane.peer import connect, last_words, peer_of, uid_is_proof
from mmlane.lane.protocol import ProtocolError

logger = logging.getLogger("mmlane.lane")


def open_link(
    invitation: Invitation, member: Member, timeout: float, wake: Callable[[], None], device: Device | None
) -> Link:
    """Everything up to the mapping of the memory. If interrupted, the connection goes with this frame.

    member: what this reader asks to be. wake, device: as `Link` wants them. Raises ProtocolError where the
    producer refuses or is none, TimeoutError after `timeout` seconds, and OSError.
    """
    with ExitStack() as scope:
        with needed("a Unix socket"):
            connection = close_in_child(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        scope.enter_context(connection)
        connect(connection, invitation.name, timeout)
        connection.settimeout(timeout)
        if uid_is_proof() and (uid := peer_of(connection).uid) != os.geteuid():
            raise ProtocolError(f"it belongs to user {uid}, this is user {os.geteuid()}")
        failpoints.reached("join.connected")
        nonce = secrets.token_hex(16)
        with suppress(BrokenPipeError):  # it has rejected this reader already, and said why
            connection.send(
                protocol.hello(invitation.secret, member.group, member.number, nonce), socket.MSG_NOSIGNAL
            )
        failpoints.reached("join.greeted")
        link = _map(invitation, connection, nonce, wake, device)
        connection.setblocking(False)
        scope.pop_all()
        return link


def _map(
    invitation: Invitation,
    connection: socket.socket,
    nonce: str,
    wake: Callable[[], None],
    device: Device | None,
) -> Link:
    received = last_words(lambda: Received(connection, protocol.LIMIT))
    message = received.message
    failpoints.reached("join.received")
    if not message:
        raise ConnectionResetError
    kind = protocol.kind(message)
    if kind == protocol.REJECT:
        raise ProtocolError(f"it rejected this process: {protocol.read_reject(message)}")
    if kind != protocol.WELCOME:
        raise ProtocolError(f"message {kind} instead of a WELCOME")
    found = protocol.read_welcome(message, invitation.secret, nonce)
    try:
        descriptor: Descriptor = received
        if descriptor.fd < 0:
            descriptor = Descriptor(os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            logger.warning(
                "lane %s goes without SCM_RIGHTS: its memory was opened as %s", invitation.name, found.path
            )
        link = Link(invitation.name, connection, descriptor, found.nbytes, found.slots, wake, device)
    except (OSError, ValueError) as error:
        reason = f"{found.nbytes} bytes could not be mapped ({error})"
        with suppress(OSError):  # gone already
            connection.send(protocol.reject(reason), socket.MSG_NOSIGNAL)
        raise ProtocolError(f"{reason}: make its capacity smaller, or raise `ulimit -v` or `ulimit -n`") from error
    failpoints.reached("join.mapped")
    return link


async def in_a_thread(join: Callable[[threading.Event], None], name: str) -> None:
    """Wait in a task for what a thread of that name does; raises what that raises.

    join: what to do; it is given an event that is set once the task waits no more, since it was cancelled.
    """
    loop = asyncio.get_running_loop()
    joined: asyncio.Future[None] = loop.create_future()
    given_up = threading.Event()

    def tell(error: BaseException | None) -> None:
        if joined.done():
            return  # it was cancelled
        if error is None:
            joined.set_result(None)
        else:
            joined.set_exception(error)

    def work() -> None:
        problem: BaseException | None = None
        try:
            join(given_up)
        except Exception as error:  # noqa: BLE001 - whatever it is, the task is to raise it
            problem = error
        with suppress(RuntimeError):  # the loop is closed, and the task is gone
            loop.call_soon_threadsafe(tell, problem)

    try:
        # Not one of the loop's own, which the process would wait for at its end.
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        raise JoinRefused(f"no thread to join a lane ({error}): raise `ulimit -u`") from error
    try:
        await joined
    finally:
        given_up.set()
