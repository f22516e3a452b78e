"""What holds of a release as a user has it: features by lane."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from packaging.version import Version

import mmlane_patches
from devkit.images import jpeg
from mmlane import __version__, compat
from mmlane.engine import Engine
from mmlane.settings import Settings
from tests.engine import asking, server_lanes
from tests.engine.request_kinds import ANSWERED
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

STATES = ("off", "unused", "opening", "open", "failed")


def test_the_first_feature_opens_the_lane(version: str, lane_server: WatchedServer) -> None:
    specs, _ = compat.contributed(mmlane_patches)
    decisions = compat.plan(specs, Engine(Version(version), None), Settings())
    server_lanes.open_lanes(lane_server)
    assert server_lanes.lane(lane_server).joined == {"dp0": [0, 1]}
    assert len(re.findall("the lane is open", lane_server.log())) == 1
    (applied,) = re.findall("mmlane:   applied: (.*)", lane_server.log())
    assert applied == ", ".join(i for i, d in decisions.items() if d.state == "planned")
    assert "lane" in applied.split(", ")


def test_ranks_wait_for_nothing(lane_server: WatchedServer) -> None:
    """Counted: the unpatched engine's ranks wait for each other at every image, ours at none that goes by lane."""
    server_lanes.open_lanes(lane_server)
    before = lane_server.collectives()
    for ask in (*ANSWERED.values(), asking.one_image_n3):
        assert ask(lane_server).status == 200
    assert lane_server.collectives() == before


@pytest.mark.parametrize("held", [False, True])
def test_eight_samples_share_one_copy(held: bool, lane_server: WatchedServer) -> None:
    """Also when each is sent only after all tickets before it, that of the warm-up first, have been released."""
    server_lanes.open_lanes(lane_server)
    picture = jpeg(640, 480, seed=11 + held)
    before = server_lanes.lane(lane_server)
    one = lane_server.generate([picture], asking.TEXT)
    between = server_lanes.lane(lane_server)
    with server_lanes.flag(lane_server, "hold") if held else nullcontext():
        eight = lane_server.generate([picture], asking.TEXT, n=8)
    after = server_lanes.lane(lane_server)
    assert asking.tokens(eight) == asking.tokens(one) * 8
    assert between.copied_bytes - before.copied_bytes >= 640 * 480 * 3 * 4
    assert after.copied_bytes - between.copied_bytes == between.copied_bytes - before.copied_bytes
    assert after.puts - between.puts == 9  # the request that warms the prefix is one, too


def test_hanging_up_on_several_samples(lane_server: WatchedServer) -> None:
    """At the first token, and while the warm-up is under way: nothing is left, and no collector is waited for."""
    server_lanes.open_lanes(lane_server)
    server_lanes.wait_for_baseline(lane_server)
    with server_lanes.flag(lane_server, "uncollected"):
        for seed in range(30, 33):
            events = lane_server.stream([asking.image(seed)], asking.TEXT, n=3, max_new_tokens=50)
            next(events)
            events.close()  # type: ignore[attr-defined]
        server_lanes.wait_for_baseline(lane_server)
        for seed in range(33, 36):
            with (
                asking.schedulers_stopped(lane_server),
                server_lanes.asked_and_left(lane_server, asking.image(seed), n=3),
            ):
                asking.wait_for(lambda: server_lanes.lane(lane_server).tickets == 1, "the ticket")
            server_lanes.wait_for_baseline(lane_server)


def test_metrics(lane_server: WatchedServer) -> None:
    """In the engine's own /metrics, where numbers are written once a second."""
    server_lanes.open_lanes(lane_server)
    assert asking.ANSWERED["one image"](lane_server).status == 200  # the first that surely goes by lane

    def now() -> dict[str, float]:
        stats = server_lanes.lane(lane_server)
        return {
            'mmlane_lane_bytes{kind="capacity"}': stats.capacity_bytes,
            'mmlane_lane_bytes{kind="committed"}': stats.committed_bytes,
            'mmlane_lane_bytes{kind="pinned"}': 0,
            'mmlane_lane_bytes{kind="used"}': stats.used_bytes,
            "mmlane_lane_extents": stats.extents,
            "mmlane_lane_tickets": stats.tickets,
            'mmlane_lane_readers{kind="joined"}': 2,
            'mmlane_lane_readers{kind="expected"}': 2,
            "mmlane_puts_total": stats.puts,
            "mmlane_shared_puts_total": stats.shared,
            "mmlane_copied_bytes_total": stats.copied_bytes,
            "mmlane_copy_seconds_total": stats.copy_seconds,
            "mmlane_lost_tickets_total": 0,
            'mmlane_fallbacks_total{cause="not_open"}': stats.fallbacks["not_open"],
            f'mmlane_info{{mode="lane",version="{__version__}"}}': 1,
            **{
                f"mmlane_{name}": getattr(stats, name)
                for name in ("capacity_bytes", "committed_bytes", "used_bytes", "extents", "tickets")
            },
            "mmlane_pinned_bytes": 0,
            "mmlane_joined_readers": 2,
            "mmlane_expected_readers": 2,
            "mmlane_malformed_messages_total": 0,
            "mmlane_rejected_peers_total": stats.rejected_peers,
            **{f'mmlane_lanes{{state="{state}"}}': float(state == "open") for state in STATES},
        }

    assert now()["mmlane_puts_total"] > 0
    asking.wait_for(
        lambda: server_lanes.metrics(lane_server) == pytest.approx(now()),
        lambda: f"{server_lanes.metrics(lane_server)} to be {now()}",
    )


def test_status(lane_server: WatchedServer) -> None:
    command = [str(Path(sys.executable).with_name("mmlane")), "status", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = [told for told in json.loads(shown.stdout) if told["pid"] == server_lanes.lane(lane_server).pid]
    assert found["stats"] == json.loads(json.dumps(server_lanes.lane(lane_server).as_dict()))
