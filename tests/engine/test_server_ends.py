"""The end of a server that other tests have used: whatever process dies, nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

from tests.conftest import EVERY, USUAL
from tests.engine import asking, server_lanes
from tests.engine.faults import DEFERRED
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.killed import RELEASES, killed_in_a_burst
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

ENDS_S = 180.0  # from 0.5.14 on the main process waits a minute for core dumps


def first_rank(server: WatchedServer) -> None:
    asking.kill_all(server, server.find("sglang::scheduler")[:1])


def last_rank(server: WatchedServer) -> None:
    asking.kill_all(server, server.find("sglang::scheduler")[-1:])


def detokenizer(server: WatchedServer) -> None:
    asking.kill_all(server, server.find("sglang::detokenizer"))


def main_process(server: WatchedServer) -> None:
    asking.kill_all(server, [server.pid])


def by_itself(server: WatchedServer) -> None:
    """A rank that ends ends the engine, as without the plugin: no process waits for a reader that is gone."""
    server.kill(server.find("sglang::scheduler")[-1])
    asking.resume(server)
    asking.wait_for(lambda: server.find("sglang::scheduler") == [], "the other rank's end", ENDS_S)
    server.stop()


def orderly(server: WatchedServer) -> None:
    """By SIGTERM to the main process, as from a container's runtime."""
    asking.resume(server)
    server.stop(ENDS_S)
    has_ended(server)
    assert server.exit_signal() is None


def has_ended(server: WatchedServer) -> None:
    """Wait for its last thread: until then the kernel keeps what they share, though the first shows as ended."""
    asking.wait_for(lambda: not server.alive(), "the main process's last thread to end")


KILLED = (first_rank, last_rank, detokenizer, main_process)
# On the usual releases, each end is seen once; on the others in turn.
ENDS = dict(zip(USUAL, (first_rank, last_rank, by_itself, main_process, detokenizer, orderly), strict=True))


def end_of(version: str) -> Callable[[WatchedServer], None]:
    return ENDS.get(version) or KILLED[EVERY.index(version) % len(KILLED)]


def ends_in_a_burst(server: WatchedServer, end: Callable[[WatchedServer], None]) -> None:
    """With two images of each of several requests on their way to the schedulers."""
    server_lanes.open_lanes(server)
    server_lanes.wait_for_baseline(server)
    # 0.5.9 sends the images of a request as one feature.
    tickets = asking.BURST * (1 if Version(server.version) < DEFERRED else 2)
    before = asking.segments(server)
    pids = {process.pid for process in server.processes()}
    server.verify()
    server.breaks()
    with asking.burst(server):
        asking.wait_for(lambda: server_lanes.lane(server).tickets >= tickets, "the tickets")
        assert asking.segments(server) == before
        end(server)
    has_ended(server)
    assert server.processes() == []
    assert server_lanes.features(server) == []
    assert asking.segments(server).keys() <= before.keys()
    assert server_lanes.names(pids) == []


def test_nothing_is_left_of_what_was_asked(lane_server: WatchedServer) -> None:
    """After everything that other tests have asked of this server."""
    server_lanes.open_lanes(lane_server)
    server_lanes.wait_for_baseline(lane_server)
    assert server_lanes.lane(lane_server).lost_tickets == server_lanes.lane(lane_server).malformed_messages == 0
    assert list(server_lanes.lane(lane_server).fallbacks) == ["not_open"]
    assert server_lanes.features(lane_server) == []


def test_nothing_is_left_of_the_server(version: str, lane_server: WatchedServer) -> None:
    ends_in_a_burst(lane_server, end_of(version))


def test_nothing_is_left_by_the_backports(backport_server: WatchedServer) -> None:
    """After everything that other tests have asked of this server, while it still runs and when it has ended."""
    server_lanes.wait_for_no_features(backport_server)
    backport_server.stop()
    assert server_lanes.features(backport_server) == []
    assert backport_server.processes() == []


@pytest.mark.matrix
@pytest.mark.parametrize("end", KILLED, ids=lambda end: end.__name__)
@pytest.mark.releases(*RELEASES)
def test_killed_in_a_burst(release: str, end: Callable[[WatchedServer], None], plugin_wheel: Path) -> None:
    with WatchedServer(release, plugin=plugin_wheel) as server:
        ends_in_a_burst(server, end)


@pytest.mark.matrix
@pytest.mark.releases("newest")
def test_a_rank_that_ends_ends_the_engine(release: str, plugin_wheel: Path) -> None:
    with WatchedServer(release, plugin=plugin_wheel) as server:
        ends_in_a_burst(server, by_itself)


# What a server without the plugin leaves is in the transcripts: tests/engine/unpatched/killed.py.


@pytest.mark.releases(*RELEASES)
def test_unpatched_killed_in_a_burst(release: str, transcripts: Transcripts) -> None:
    """It leaves the segments of every request that was under way."""
    assert transcripts.of(release, killed_in_a_burst) == {"leaves segments": True}
