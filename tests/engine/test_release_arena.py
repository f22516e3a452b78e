"""Each release as a user has it: features by lane, the answers those of the engine without the plugin."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.images import jpeg
from mmlane import __version__, compat
from mmlane.engine import Engine
from mmlane.settings import Settings
from tests.engine import scenarios
from tests.engine.conftest import Transcript
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

STATES = ("off", "unused", "opening", "open", "failed")
DEFERRED = Version("0.5.10")  # below it the engine broadcasts tensors, and its ranks have nothing to wait for


def test_metrics_before_the_first_image(arena: WatchedServer) -> None:
    """Who runs, and that no image has come yet. The first test here: others send some."""
    found = scenarios.metrics(arena)
    assert found[f'mmlane_info{{mode="arena",version="{__version__}"}}'] == 1
    assert scenarios.states(arena) == {"unused": 1}
    assert found['mmlane_lane_bytes{kind="capacity"}'] == found["mmlane_puts_total"] == 0


def test_a_segment_that_is_lost_before_the_lane_is_open(arena: WatchedServer) -> None:
    """The first feature goes by segment, and the ranks agree on it as they do without a lane."""
    reply = scenarios.ask_and_lose_the_segment(arena)
    assert reply.status == 500, reply.body
    assert "segment" in str(reply.body) or "shared-memory" in str(reply.body)


def test_the_first_feature_opens_the_lane(version: str, arena: WatchedServer) -> None:
    specs, _ = compat.contributed()
    decisions = compat.plan(specs, Engine(Version(version), None), Settings())
    scenarios.open_lanes(arena)
    assert scenarios.lane(arena).readers == {"dp0": 2}
    assert len(re.findall("the lane is open", arena.log())) == 1
    (applied,) = re.findall("mmlane:   applied: (.*)", arena.log())
    assert applied == ", ".join(i for i, d in decisions.items() if d.state == "planned")
    assert "arena" in applied.split(", ")


@pytest.mark.parametrize("name", scenarios.ANSWERED)
def test_the_tokens_are_those_of_the_unpatched_engine(
    name: str, unpatched: Transcript, arena: WatchedServer
) -> None:
    scenarios.open_lanes(arena)
    before = scenarios.lane(arena)
    reply = scenarios.ANSWERED[name](arena)
    assert reply.status == 200, reply.body
    assert scenarios.tokens(reply) == scenarios.tokens(unpatched.answers[name])
    after = scenarios.lane(arena)
    assert (after.puts > before.puts) == ("text" not in name)
    assert after.refused == before.refused  # nothing went another way


def test_ranks_wait_for_nothing(version: str, unpatched: Transcript, arena: WatchedServer) -> None:
    """Counted: the unpatched engine's ranks wait for each other at every image, ours at none that goes by lane."""
    assert (unpatched.collectives > 0) == (Version(version) >= DEFERRED)
    scenarios.open_lanes(arena)
    before = arena.collectives()
    for ask in (*scenarios.ANSWERED.values(), scenarios.one_image_n3):
        assert ask(arena).status == 200
    assert arena.collectives() == before


@pytest.mark.parametrize("held", [False, True])
def test_eight_samples_share_one_copy(held: bool, arena: WatchedServer) -> None:
    """Also when each is sent only after all tickets before it, that of the warm-up first, have come back."""
    scenarios.open_lanes(arena)
    picture = jpeg(640, 480, seed=11 + held)
    before = scenarios.lane(arena)
    one = arena.generate([picture], scenarios.TEXT)
    between = scenarios.lane(arena)
    with scenarios.flag(arena, "hold") if held else nullcontext():
        eight = arena.generate([picture], scenarios.TEXT, n=8)
    after = scenarios.lane(arena)
    assert scenarios.tokens(eight) == scenarios.tokens(one) * 8
    assert between.copied - before.copied >= 640 * 480 * 3 * 4
    assert after.copied - between.copied == between.copied - before.copied
    assert after.puts - between.puts == 9  # the request that warms the prefix is one, too


def test_several_images_with_n_2(arena: WatchedServer) -> None:
    reply = scenarios.two_images_n2(arena)
    assert reply.status == 200, reply.body
    assert reply.texts == arena.chat([scenarios.image(5), scenarios.image(6)], scenarios.TEXT).texts * 2


def test_streaming(unpatched: Transcript, arena: WatchedServer) -> None:
    events = list(arena.stream([scenarios.image()], scenarios.TEXT))
    assert len(events) > 1
    assert events[-1]["text"] == unpatched.answers["one image"].texts[0]


def test_concurrent_requests_of_every_kind(unpatched: Transcript, arena: WatchedServer) -> None:
    names = [*scenarios.ANSWERED] * 2
    with concurrent.futures.ThreadPoolExecutor(len(names) + 2) as pool:
        plain = [pool.submit(scenarios.ANSWERED[name], arena) for name in names]
        fanned = [pool.submit(scenarios.one_image_n3, arena), pool.submit(scenarios.two_images_n2, arena)]
        for name, future in zip(names, plain, strict=True):
            assert scenarios.tokens(future.result()) == scenarios.tokens(unpatched.answers[name])
        assert [future.result().status for future in fanned] == [200, 200]


def test_hanging_up_in_mid_flight(arena: WatchedServer) -> None:
    """A user who goes away at the first token, and one whose request is aborted on its way to the schedulers."""
    scenarios.open_lanes(arena)
    scenarios.wait_for_baseline(arena)
    events = arena.stream([scenarios.image(9)], scenarios.TEXT, max_new_tokens=200)
    next(events)
    events.close()  # type: ignore[attr-defined]
    scenarios.wait_for_baseline(arena)
    with scenarios.schedulers_stopped(arena):
        request = scenarios.in_background(
            lambda: arena.generate([scenarios.image(9)], scenarios.TEXT, max_new_tokens=2000)
        )
        scenarios.wait_for(lambda: scenarios.lane(arena).tickets == 1, "the ticket")
        assert arena.client.post("/abort_request", {"abort_all": True}).status == 200
    assert "abort" in str(request.result(scenarios.WAIT_S).body).lower()
    scenarios.wait_for_baseline(arena)
    assert arena.generate([scenarios.image()], scenarios.TEXT).status == 200


def test_hanging_up_on_several_samples(arena: WatchedServer) -> None:
    """At the first token, and while the warm-up is under way: nothing is left, and no collector is waited for."""
    scenarios.open_lanes(arena)
    scenarios.wait_for_baseline(arena)
    with scenarios.flag(arena, "uncollected"):
        for seed in range(30, 33):
            events = arena.stream([scenarios.image(seed)], scenarios.TEXT, n=3, max_new_tokens=50)
            next(events)
            events.close()  # type: ignore[attr-defined]
        scenarios.wait_for_baseline(arena)
        for seed in range(33, 36):
            with scenarios.schedulers_stopped(arena), scenarios.asked_and_left(arena, scenarios.image(seed), n=3):
                scenarios.wait_for(lambda: scenarios.lane(arena).tickets == 1, "the ticket")
            scenarios.wait_for_baseline(arena)


def test_metrics(arena: WatchedServer) -> None:
    """In the engine's own /metrics, where numbers are written once a second."""
    scenarios.open_lanes(arena)
    assert scenarios.ANSWERED["one image"](arena).status == 200  # the first that surely goes by lane

    def now() -> dict[str, float]:
        stats = scenarios.lane(arena)
        return {
            'mmlane_lane_bytes{kind="capacity"}': stats.capacity,
            'mmlane_lane_bytes{kind="committed"}': stats.warm,
            'mmlane_lane_bytes{kind="pinned"}': 0,
            'mmlane_lane_bytes{kind="used"}': stats.taken,
            "mmlane_lane_extents": stats.extents,
            "mmlane_lane_tickets": stats.tickets,
            'mmlane_lane_readers{kind="joined"}': 2,
            'mmlane_lane_readers{kind="expected"}': 2,
            "mmlane_puts_total": stats.puts,
            "mmlane_shared_puts_total": stats.shared,
            "mmlane_copied_bytes_total": stats.copied,
            "mmlane_copy_seconds_total": stats.copy_seconds,
            "mmlane_orphans_total": 0,
            'mmlane_fallbacks_total{cause="not_open"}': stats.refused["not_open"],
            f'mmlane_info{{mode="arena",version="{__version__}"}}': 1,
            **{f'mmlane_lanes{{state="{state}"}}': float(state == "open") for state in STATES},
        }

    assert now()["mmlane_puts_total"] > 0
    scenarios.wait_for(
        lambda: scenarios.metrics(arena) == pytest.approx(now()),
        lambda: f"{scenarios.metrics(arena)} to be {now()}",
    )


def test_status(arena: WatchedServer) -> None:
    command = [str(Path(sys.executable).with_name("mmlane")), "status", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = [told for told in json.loads(shown.stdout) if told["pid"] == scenarios.lane(arena).pid]
    assert found["stats"] == json.loads(json.dumps(asdict(scenarios.lane(arena))))


def test_nothing_is_left(arena: WatchedServer) -> None:
    """After everything above, while the engine still runs and when it has ended."""
    scenarios.wait_for_baseline(arena)
    assert scenarios.lane(arena).orphans == scenarios.lane(arena).strays == 0
    assert list(scenarios.lane(arena).refused) == ["not_open"]
    assert scenarios.features(arena) == []
    arena.stop()
    assert scenarios.features(arena) == []
    assert arena.processes() == []
