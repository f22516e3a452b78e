"""Two pipeline stages: the second gets its requests from the first, and answers must not notice the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from devkit.checkpoint import tiny_qwen2_5_vl
from tests.engine import scenarios
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

TENSOR = 640 * 480 * 3 * 4 // 2  # bytes; a lower bound for the float32 patches of a 640x480 image
ENV = {
    "MMLANE_LOG": "debug",
    # Four ranks start one by one on memory that others use as well.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}


def two_stages(release: str, plugin: Path | None = None, mode: str = "off") -> WatchedServer:
    """Two stages of two ranks each, with a model that the engine can split."""
    args = ["--model-path", str(tiny_qwen2_5_vl()), "--pp-size", "2"]
    return WatchedServer(release, plugin=plugin, args=args, env={**ENV, "MMLANE": mode})


def bytes_between_ranks(server: WatchedServer) -> int:
    """What an image of 640x480 makes them send each other."""
    before = scenarios.loopback_bytes()
    scenarios.ANSWERED["larger image"](server)
    return scenarios.loopback_bytes() - before


def answers(server: WatchedServer) -> dict[str, list[list[int]]]:
    """The tokens of each plain request, the image kinds among them."""
    replies = {name: ask(server) for name, ask in scenarios.ANSWERED.items()}
    assert {name: reply.status for name, reply in replies.items()} == dict.fromkeys(replies, 200)
    return {name: scenarios.tokens(reply) for name, reply in replies.items()}


def wait_for_no_new_segments(server: WatchedServer, before: set[str]) -> None:
    def new() -> set[str]:
        return set(scenarios.segments(server)) - before

    scenarios.wait_for(lambda: not new(), lambda: f"{new()} to go")


# Before 0.5.11 the engine makes CUDA events in this loop, whatever the device.
@pytest.mark.releases("0.5.12.post1", "0.5.11", "0.5.14", "0.5.16", "0.5.19", "0.5.23")
def test_two_stages(release: str, plugin_wheel: Path) -> None:
    with two_stages(release) as server:
        assert len(server.find("sglang::scheduler_PP1")) == 2
        before = set(scenarios.segments(server))  # the engine's own queues, under the same names
        expected = answers(server)
        assert bytes_between_ranks(server) > 2 * TENSOR
        wait_for_no_new_segments(server, before)

    with two_stages(release, plugin_wheel, "arena") as server:
        before = set(scenarios.segments(server))
        scenarios.open_lanes(server)  # of the first stage: the other has no use for it
        assert scenarios.lane(server).readers == {"dp0": 2}
        assert answers(server) == expected
        one = scenarios.tokens(server.generate([scenarios.image(4)], scenarios.TEXT))
        assert scenarios.tokens(scenarios.one_image_n3(server)) == one * 3
        assert scenarios.two_images_n2(server).status == 200
        assert bytes_between_ranks(server) < TENSOR
        scenarios.wait_for_baseline(server)
        wait_for_no_new_segments(server, before)


@pytest.mark.matrix
@pytest.mark.releases("0.5.12.post1", "0.5.23")
def test_two_stages_without_the_lane(release: str, plugin_wheel: Path) -> None:
    with two_stages(release) as server:
        expected = answers(server)
    with two_stages(release, plugin_wheel, "backport") as server:
        before = set(scenarios.segments(server))
        assert answers(server) == expected
        one = scenarios.tokens(server.generate([scenarios.image(4)], scenarios.TEXT))
        assert scenarios.tokens(scenarios.one_image_n3(server)) == one * 3
        assert scenarios.two_images_n2(server).status == 200
        # What the first stage finds out is what the second is told.
        lost = scenarios.ask_and_lose_the_segment(server)
        assert lost.status == 500, lost.body
        assert scenarios.tokens(server.generate([scenarios.image(4)], scenarios.TEXT)) == one
        wait_for_no_new_segments(server, before)
