"""Three engines in one container: one has crashed, one is at work, and one starts with the plugin."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from devkit.container import Container
from devkit.sharedmemory import can_be_private
from mmlane_patches.verdicts import SLACK_S
from tests.engine import asking, server_lanes
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine


def crash(server: WatchedServer) -> set[str]:
    """Kill a scheduler while images are on their way, and tell what that leaves."""
    before = set(asking.segments(server))

    def on_their_way() -> set[str]:
        return set(asking.segments(server)) - before

    with asking.schedulers_stopped(server) as pids:
        for _ in range(3):
            asking.in_background(lambda: asking.ANSWERED["one image"](server))
        asking.wait_for(lambda: len(on_their_way()) == 3, lambda: f"three segments: {on_their_way()}")
        server.kill(pids[0])
        # The others follow: some releases end them themselves, at once or after a minute, and some do not notice.
        # Python's tracker of segments, which would clean up, is among those that are killed.
        for pid in server.find("resource_tracker"):
            server.kill(pid)
        server.stop()
    return set(asking.segments(server))


# The start of an engine that can have no lane is looked at here, too: a server of its own would take longer.
NO_LANE = {"MMLANE_CAPACITY_MB": "99999999999", "MMLANE_CAPCITY_MB": "64"}


def says_that_it_has_no_lane(server: WatchedServer) -> None:
    """At start, with the variable's name; once, and not again at the first image, which is answered."""

    def lines() -> list[str]:
        return [line for line in server.log().splitlines() if "no lane here" in line]

    (line,) = lines()
    assert "shared-memory segments instead" in line and "MMLANE_CAPACITY_MB (here 99999999999)" in line
    assert "MMLANE_CAPCITY_MB (did you mean MMLANE_CAPACITY_MB?)" in server.log()
    assert server_lanes.states(server) == {"failed": 1}
    assert asking.ANSWERED["one image"](server).status == 200
    assert lines() == [line] and server_lanes.lanes(server) == []


@pytest.mark.skipif(not can_be_private(), reason="needs the right to make namespaces")
@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "newest")
def test_a_start_reclaims_what_a_crash_left_and_nothing_of_a_living_engine(
    release: str, plugin_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Container(8 << 30) as container:
        monkeypatch.setattr("devkit.server.privately", lambda command, size: container.inside(command))
        with WatchedServer(release) as crashed:
            dead = crash(crashed)
        assert len(dead) >= 3
        # Who starts too soon after them counts as older, and they would be left.
        newest = max((container.shm / name).stat().st_ctime for name in dead)
        asking.wait_for(lambda: time.time() > newest + 2 * SLACK_S, "their age to be beyond doubt")
        with WatchedServer(release, tp=1) as living:
            with asking.schedulers_stopped(living):
                answer = asking.in_background(lambda: living.generate([asking.image(7)], asking.TEXT))
                asking.wait_for(lambda: len(asking.segments(living)) > len(dead), "the request's segment")
                alive = set(asking.segments(living)) - dead
                env = {"MMLANE_SWEEP": "private", **NO_LANE}
                with WatchedServer(
                    release, plugin=plugin_wheel, tp=1, env=env, args=["--enable-metrics"]
                ) as started:
                    segments = set(asking.segments(started))
                    assert alive <= segments
                    assert not dead & segments
                    assert re.search(r"mmlane: reclaimed \d+ segments", started.log())
                    assert re.search(r"mmlane: left 1 segment .*: process \d+ .* is older", started.log())
                    says_that_it_has_no_lane(started)
            assert answer.result(asking.WAIT_S).status == 200
