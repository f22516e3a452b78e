"""Named points in the lane's protocol, at which a test can kill the process. Else nothing happens there."""

from __future__ import annotations

from collections.abc import Callable

# role.what-has-just-been-done. The tests kill a process at every one of them.
PRODUCER = (
    "put.allocated",
    "put.reserved",
    "put.copied",
    "put.published",
    "drain.received",
    "accept.connected",
    "accept.welcomed",
    "accept.joined",
    "grow.reserved",
    "grow.populated",
    "grow.announced",
    "hand_back.announced",
    "hand_back.punched",
    "revoke.announced",
)
READER = (
    "hello.connected",
    "hello.sent",
    "map.received",
    "map.mapped",
    "map.acknowledged",
    "take.claimed",
    "take.mapped",
    "give_back.queued",
    "give_back.sent",
    "grow.heard",
    "hand_back.heard",
    "revoke.heard",
)

# What to call with the name of a point; set by tests only.
probe: Callable[[str], None] | None = None


def reached(name: str) -> None:
    """Say that the protocol is at this point."""
    if probe is not None:
        probe(name)
