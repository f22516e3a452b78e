"""Named points in the lane's protocol, at which a test can stop or kill the process. Else they do nothing."""

from __future__ import annotations

from collections.abc import Callable

# What has just been done. The tests kill a process at every one of them.
PRODUCER = (
    "put.allocated",
    "put.committed",
    "put.copied",
    "put.published",
    "drain.received",
    "accept.connected",
    "accept.proven",
    "accept.welcomed",
    "accept.joined",
    "commit.reserved",
    "commit.populated",
    "decommit.chosen",
    "decommit.punched",
    "recall.sent",
)
READER = (
    "join.connected",
    "join.greeted",
    "join.received",
    "join.mapped",
    "join.stored",
    "join.acknowledged",
    "take.claimed",
    "take.mapped",
    "release.queued",
    "release.sent",
    "recall.heard",
)

# What to call with the name of a point; set by tests only.
probe: Callable[[str], None] | None = None


def reached(name: str) -> None:
    """Say that the protocol is at this point."""
    if probe is not None:
        probe(name)
