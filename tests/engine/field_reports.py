"""What the tests of reports from the field share: on which releases they run, and another way for features."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from packaging.version import Version

from devkit.client import Reply
from mmlane.compat import matrix
from mmlane.lane.status import switch
from tests.engine import asking, server_lanes
from tests.engine.watching import WatchedServer


def on(usual: str, since: str = "0") -> pytest.MarkDecorator:
    """Every release from `since` on with --engines all, else the usual one."""
    others = [str(version) for version in matrix().engines if version >= Version(since)]
    return pytest.mark.releases(usual, *others)


@contextmanager
def lane_off(server: WatchedServer) -> Iterator[None]:
    """Inside, features travel by segment."""
    name = server_lanes.lane(server).name
    assert switch(name, off=True, timeout=asking.WAIT_S).state == "off"
    try:
        yield
    finally:
        assert switch(name, off=False, timeout=asking.WAIT_S).state == "open"


def flush(server: WatchedServer) -> None:
    """Empty the engine's cache of prefixes, which it does as soon as it has nothing to do."""
    asking.wait_for(lambda: server.client.post("/flush_cache", None).status == 200, "an idle engine")


def by_segment(server: WatchedServer, ask: Callable[[], Reply]) -> Reply:
    """The answer to a request whose features do not go by lane, and which is then forgotten."""
    with lane_off(server):
        reply = ask()
    flush(server)
    return reply


def nothing_left(server: WatchedServer) -> None:
    """The lanes are empty, and so is /dev/shm, once what was asked has been answered."""
    server_lanes.wait_for_baseline(server)
    server_lanes.wait_for_no_features(server)


def cached_tokens(log: str) -> int:
    """The most that a prefill has found in the engine's cache, by its log."""
    return max(map(int, re.findall(r"#cached-token: (\d+)", log)), default=0)
