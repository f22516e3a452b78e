"""One unpatched run and two patched servers for each engine release, never two at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.client import Reply
from tests.conftest import SIX, WITHOUT_LANE
from tests.engine import scenarios
from tests.engine.watching import WatchedServer

ISOLATED = Version("0.5.19")  # from here on the engine itself fails one request for one lost segment
FANNED_OUT = Version("0.5.13")  # from here on the engine itself gives each of n samples its own items


@dataclass
class Transcript:
    """What an engine without the plugin did: its answers, which faults ended it, what its ranks waited for."""

    answers: dict[str, Reply] = field(default_factory=dict)
    image_bytes: int = 0
    several_images: Reply | None = None
    one_image_n3: Reply | None = None
    survived_n3: bool = True
    lost_segment: Reply | None = None
    survived_lost_segment: bool = True
    collectives: int = 0


@pytest.fixture(scope="session")
def unpatched(version: str) -> Transcript:
    """Run a release without the plugin, through everything that this suite wants to know of it."""
    seen = Transcript()
    with WatchedServer(version, probes=["collectives"]) as server:
        for name, ask in scenarios.ANSWERED.items():
            seen.answers[name] = ask(server)
        seen.collectives = server.collectives()
        before = scenarios.loopback_bytes()
        scenarios.ANSWERED["larger image"](server)
        seen.image_bytes = scenarios.loopback_bytes() - before
        seen.several_images = scenarios.two_images_n2(server)
        seen.one_image_n3 = scenarios.one_image_n3(server)
        seen.survived_n3 = survived(server, seen.one_image_n3)
        if seen.survived_n3:
            seen.lost_segment = scenarios.ask_and_lose_the_segment(server)
            seen.survived_lost_segment = survived(server, seen.lost_segment)
    if not seen.survived_n3:
        with WatchedServer(version) as server:
            seen.lost_segment = scenarios.ask_and_lose_the_segment(server)
            seen.survived_lost_segment = survived(server, seen.lost_segment)
    return seen


def survived(server: WatchedServer, reply: Reply) -> bool:
    """Whether the engine goes on serving; waits for its end when the connection broke."""
    if reply.status == 0:
        scenarios.wait_for(lambda: len(server.find("sglang::scheduler")) < server.tp, "a scheduler's end")
        return False
    return scenarios.ANSWERED["text only"](server).status == 200


@pytest.fixture(scope="session")
def patched(
    version: str, unpatched: Transcript, plugin_wheel: Path, request: pytest.FixtureRequest
) -> Iterator[WatchedServer]:
    """A release with the back-ports alone, serving; it starts when the unpatched run is over."""
    if request.config.getoption("--engines") == ",".join(SIX) and version not in WITHOUT_LANE:
        pytest.skip("the back-ports alone: with --engines all, or naming this release")
    end_the_one_before()
    env = {"MMLANE": "backport", "MMLANE_LOG": "debug"}
    with WatchedServer(version, plugin=plugin_wheel, env=env) as server:
        _running.append(server)
        yield server


# A session's fixtures live until the release changes, and two servers do not: tests of one do not come after
# those of the next (test_release, test_release_arena).
_running: list[WatchedServer] = []


def end_the_one_before() -> None:
    while _running:
        _running.pop().stop()


@pytest.fixture(scope="session")
def arena(version: str, unpatched: Transcript, plugin_wheel: Path) -> Iterator[WatchedServer]:
    """A release as a user has it, with the plugin installed and no mode chosen."""
    end_the_one_before()
    with WatchedServer(
        version,
        probes=["collectives", "held", "uncollected"],
        plugin=plugin_wheel,
        args=["--enable-metrics"],
        env={"MMLANE_LOG": "debug"},
    ) as server:
        _running.append(server)
        yield server
