"""The lane: tensors from one producing process to several reading ones on a host, at the speed of one memcpy.

    lane = Lane(readers={"tp": 2})              # in the producer
    ticket = lane.put(tensor)                   # plain bytes, or a Refused that says why not

    reader = Reader(group="tp")                 # in each reader
    reader.join(address)
    tensor = reader.take(ticket, mode="view")   # given back when the tensor is let go

docs/lane.md explains the protocol. Needs torch; nothing here knows the engine.
"""

from mmlane.lane.errors import (
    JoinRefused,
    LaneError,
    LaneUnavailable,
    MalformedTicket,
    Refused,
    StaleTicket,
    TicketError,
    UnknownLane,
)
from mmlane.lane.producer import Lane, LaneStats
from mmlane.lane.reader import Mode, Reader

__all__ = [
    "JoinRefused",
    "Lane",
    "LaneError",
    "LaneStats",
    "LaneUnavailable",
    "MalformedTicket",
    "Mode",
    "Reader",
    "Refused",
    "StaleTicket",
    "TicketError",
    "UnknownLane",
]
