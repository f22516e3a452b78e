"""How a controller passes requests on, where some of its data-parallel replicas are on other nodes.

It picks a replica after the tokenizer has put a request's tensors into its lane, whose tickets are of use on the
first node alone. So the controller reads that lane, too: what it sends to a replica elsewhere has the tensors
themselves, each at its own size, and crosses once. All else it passes on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from mmlane.engine.launch import without_lane
from mmlane.engine.requests import Place, id_of
from mmlane.engine.topology import CONTROLLER, replicas_elsewhere
from mmlane.log import guarded, logger
from mmlane.transport.agreement import arrivals
from mmlane.transport.base import Controller, Ownership
from mmlane.transport.chain import Chain
from mmlane.transport.inline import compact
from mmlane.transport.lane import Ticket
from mmlane.transport.pointer import is_pointer, slot


class RemoteReplica:
    """The socket of a replica on another node."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    def send_pyobj(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """As the socket's own, up to 0.5.14; later releases call `sending_tensors`."""
        with tensors_in(message):
            self.socket.send_pyobj(message, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


def start_after(init: Callable[..., None]) -> Callable[..., None]:
    """`DataParallelController.__init__`, by which it has its sockets."""

    @wraps(init)
    def __init__(self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        init(self, server_args, *args, **kwargs)
        with guarded("start", "the lane does not open, and features travel inside of their requests"):
            start(self, server_args)

    return __init__


def start(controller: Any, server_args: Any) -> None:
    """Give a controller that has just been made its side, if requests leave this node from it."""
    sockets = controller.workers
    elsewhere = [replica for replica in replicas_elsewhere(server_args) if sockets[replica] is not None]
    if not elsewhere or without_lane(server_args):
        return
    slot.chain = Chain(Controller(CONTROLLER, 0, writable=True, engine_class=slot.chain.here.engine_class))
    for replica in elsewhere:
        sockets[replica] = RemoteReplica(sockets[replica])


def sending_tensors(send: Callable[..., None]) -> Callable[..., None]:
    """`sock_send(socket, obj, flags=0)` from 0.5.15 on, which makes bytes of `obj` before the socket is asked."""

    @wraps(send)
    def sock_send(socket: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(socket, RemoteReplica):
            send(socket, obj, *args, **kwargs)
            return
        with tensors_in(obj):
            send(socket.socket, obj, *args, **kwargs)

    return sock_send


@contextmanager
def tensors_in(message: Any) -> Iterator[None]:
    """While inside, a message has tensors in the place of pointers; afterwards nothing, as it has been sent.

    What is lost stays a pointer, which all ranks refuse.
    """
    taken: list[Place] = []
    with guarded("controller", "a request may fail for want of its features; send it again"):
        for arrival in arrivals([message]):
            for pointer in arrival.pointers():
                if isinstance(pointer.payload, Ticket):
                    pointer.payload.ownership = Ownership.OURS  # what is not taken is released
            for place in arrival.places:
                if any(map(is_pointer, place.values())):
                    taken.append(place)
                    place.replace(partial(_tensor, id_of(arrival.request)))
    try:
        yield
    finally:
        for place in taken:
            place.put(None)  # the engine keeps a message until the next one comes


def _tensor(rid: Any, value: Any) -> Any:
    if not is_pointer(value):
        return value
    value.invitation = None  # there is no way from there to this node's lane
    try:
        return compact(value.materialize())
    except Exception as error:  # noqa: BLE001 - whatever it is, this request alone is refused
        value.lost = str(error)
        logger.error("request %s, for a replica on another node: %s", rid, value.lost)
        return value
