"""The lane: tensors from one producing process to several reading ones on a host, at the speed of one memcpy.

    with Lane(readers={"tp": 2}) as lane:       # in the producer; send `lane.invitation` to the readers
        if not lane.wait_open(timeout=60):      # or `await lane.wait_open_async(timeout=60)`
            ...                                 # not all of them have joined: `put` refuses until they have
        ticket = lane.put(tensor)               # plain bytes, or a Refused that says why not; copies the tensor

    with Reader("tp", 0) as reader:             # in each reader, with its number
        reader.join(invitation)                 # the lane's; or `await reader.join_async(invitation)`
        tensor = reader.take(ticket, mode="view")   # released when the tensor is let go

Any process of the same user can ask after lanes: mmlane.lane.status.

docs/lane.md explains the protocol. `Lane` and `Reader` need torch; nothing here knows the engine.

The modules, from what a program calls down to what the kernel does:

- of the producer: producer (`Lane`), filling, issuing, committing, each a step of a put; lifecycle and guard, its
  state and the lock of that; reservation; bookkeeping and allocator, which are pure logic. Its thread: control,
  admission, inbox; housekeeping and pinnable, what it does for the lane; agenda, how it is told.
- of a reader: reader (`Reader`), joining; link and outbox, one for each lane; listening, its thread; device,
  pinned and cuda, for a GPU.
- of both: protocol, ticket, invitation, peer; memory, mapping, descriptor, libc; arguments, errors, fork,
  failpoints.

No error is logged as an object, only its text: a handler that keeps records would keep its traceback, and with
that a lane's memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mmlane.lane.errors import (
    JoinRefused,
    LaneError,
    LaneUnavailable,
    MalformedInvitation,
    MalformedTicket,
    Refused,
    StaleHere,
    StaleTicket,
    TicketError,
    UnknownLane,
)
from mmlane.lane.invitation import Invitation
from mmlane.lane.status import LaneStats, StatusError

if TYPE_CHECKING:
    from mmlane.lane.producer import Lane
    from mmlane.lane.reader import Mode, Reader
    from mmlane.lane.reservation import Reservation
else:
    # These need torch, which takes seconds to import; a process that asks for a lane's status does not.
    _LATER = {
        "Lane": "producer",
        "Mode": "reader",
        "Reader": "reader",
        "Reservation": "reservation",
    }

    def __getattr__(name):
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

    def __dir__():
        return sorted({*globals(), *_LATER})


__all__ = [
    "Invitation",
    "JoinRefused",
    "Lane",
    "LaneError",
    "LaneStats",
    "LaneUnavailable",
    "MalformedInvitation",
    "MalformedTicket",
    "Mode",
    "Reader",
    "Refused",
    "Reservation",
    "StaleHere",
    "StaleTicket",
    "StatusError",
    "TicketError",
    "UnknownLane",
]
