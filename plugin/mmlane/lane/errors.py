"""What can go wrong with a lane: exceptions for mistakes and losses, `Refused` for what a producer must expect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Cause = Literal["not_open", "off", "full", "oversize", "unsupported", "closed"]


class LaneError(Exception):
    """Anything a lane raises."""


class LaneUnavailable(LaneError):
    """This machine or sandbox cannot carry a lane at all; the message names what is missing."""


class JoinRefused(LaneError):
    """A reader could not join; the message says why: no producer there, a wrong secret, another has its number."""


class MalformedInvitation(JoinRefused, ValueError):
    """Not an invitation, one that was damaged, or one of another version of the protocol."""


class TicketError(LaneError, ValueError):
    """A ticket cannot be taken. It fails its own request; the lane and all other tickets are as before."""


class MalformedTicket(TicketError):
    """Not a ticket, or one that was changed on its way."""


class StaleTicket(TicketError):
    """A ticket that was taken or released before, withdrawn or recalled; or one that its lane never issued."""


class StaleHere(StaleTicket):
    """A ticket that other readers may still take: this one has answered that it had not seen it."""


class UnknownLane(TicketError):
    """A ticket of a lane that this reader has not joined, or that is gone."""


@dataclass(frozen=True)
class Refused:
    """What `Lane.put` returns in a ticket's place, so that the caller can send the tensor another way.

    cause: `not_open` (not all expected readers have joined), `off` (the lane was switched off), `full` (no
    room, or no memory for more), `oversize` (larger than the whole lane), `unsupported` (not a plain dense CPU
    tensor), `closed` (permanently; a reader has ended, say).
    detail: one line for people, with what was wanted, what was found and what helps.
    """

    cause: Cause
    detail: str


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Have an OSError say what it was that could not be had."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror or error}") from error
