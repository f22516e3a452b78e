"""Each release with the plugin, in both modes: it answers as it does without, and the faults are gone."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from packaging.version import Version

from devkit.images import jpeg
from mmlane import __version__
from tests.engine import asking, server_lanes
from tests.engine.conftest import MODES
from tests.engine.faults import DEFERRED, FANNED_OUT
from tests.engine.request_kinds import ANSWERED, AT_ONCE
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

both = pytest.mark.parametrize("mode", MODES)


@contextmanager
def by_its_way(server: WatchedServer, mode: str, *, images: bool = True) -> Iterator[None]:
    """With the lane: images that are asked about inside go by lane, and nothing goes another way."""
    if mode != "lane":
        yield
        return
    server_lanes.open_lanes(server)
    before = server_lanes.lane(server)
    yield
    after = server_lanes.lane(server)
    assert (after.puts > before.puts) == images
    assert after.fallbacks == before.fallbacks


def test_metrics_before_the_first_image(lane_server: WatchedServer) -> None:
    """Who runs, and that no image has come yet. The first test on this server: others send some."""
    found = server_lanes.metrics(lane_server)
    assert found[f'mmlane_info{{mode="lane",version="{__version__}"}}'] == 1
    assert server_lanes.states(lane_server) == {"unused": 1}
    assert found["mmlane_capacity_bytes"] == found["mmlane_puts_total"] == 0


@both
def test_a_lost_segment_fails_its_own_request(mode: str, server: WatchedServer) -> None:
    """With the lane, too: the first feature goes by segment, and the ranks agree on it as without a lane."""
    reply = asking.ask_and_lose_the_segment(server)
    assert reply.status == 500, reply.body
    assert "segment" in str(reply.body) or "shared-memory" in str(reply.body)
    assert server.generate([asking.image(7)], asking.TEXT).status == 200


@both
@pytest.mark.parametrize("name", ANSWERED)
def test_the_tokens_are_those_of_the_unpatched_engine(
    name: str, mode: str, unpatched: Any, server: WatchedServer
) -> None:
    with by_its_way(server, mode, images="text" not in name):
        reply = ANSWERED[name](server)
    assert reply.status == 200, reply.body
    assert asking.tokens(reply) == unpatched["answers"][name]["tokens"]


@both
def test_one_image_with_n_3(version: str, mode: str, unpatched: Any, server: WatchedServer) -> None:
    with by_its_way(server, mode):
        reply = asking.one_image_n3(server)
    assert reply.status == 200, reply.body
    assert asking.tokens(reply) == unpatched["pictures"]["4"]["tokens"] * 3
    if Version(version) >= FANNED_OUT:
        assert asking.tokens(reply) == unpatched["one image, n=3"]["tokens"]


@both
def test_several_images_with_n_2(mode: str, server: WatchedServer) -> None:
    with by_its_way(server, mode):
        reply = asking.two_images_n2(server)
    assert reply.status == 200, reply.body
    once = server.chat([asking.image(5), asking.image(6)], asking.TEXT)
    assert reply.texts == once.texts * 2
    # Both images count: without the second, or with a larger one, the prompt has another length.
    lengths = [
        server.chat(images, asking.TEXT, n=2).body["usage"]["prompt_tokens"]
        for images in ([asking.image(5)], [asking.image(5), jpeg(640, 480, seed=6)])
    ]
    assert lengths[0] < once.body["usage"]["prompt_tokens"] < lengths[1]


@both
def test_streaming(mode: str, unpatched: Any, server: WatchedServer) -> None:
    events = list(server.stream([asking.image()], asking.TEXT))
    assert len(events) > 1
    assert [events[-1]["text"]] == unpatched["answers"]["one image"]["texts"]


@both
def test_concurrent_requests_of_every_kind(mode: str, unpatched: Any, server: WatchedServer) -> None:
    names = [*AT_ONCE] * 2
    with concurrent.futures.ThreadPoolExecutor(len(names) + 2) as pool:
        plain = [pool.submit(AT_ONCE[name], server) for name in names]
        fanned = [pool.submit(asking.one_image_n3, server), pool.submit(asking.two_images_n2, server)]
        for name, future in zip(names, plain, strict=True):
            assert asking.tokens(future.result()) == unpatched["answers"][name]["tokens"]
        assert [future.result().status for future in fanned] == [200, 200]


def on_its_way(server: WatchedServer, mode: str, before: dict[str, int]) -> None:
    """Wait until the only request is between the tokenizer and the schedulers. before: the segments until then."""
    if mode == "lane":
        asking.wait_for(lambda: server_lanes.lane(server).tickets == 1, "the ticket")
    else:
        asking.wait_for(lambda: bool(asking.segments(server).keys() - before), "the segment")


def nothing_under_way(server: WatchedServer, mode: str) -> None:
    if mode == "lane":
        server_lanes.wait_for_baseline(server)
    server_lanes.wait_for_no_features(server)


@both
def test_hanging_up_in_mid_flight(mode: str, server: WatchedServer) -> None:
    """A user who goes away at the first token, and one whose request is aborted on its way to the schedulers."""
    if mode == "lane":
        server_lanes.open_lanes(server)
    nothing_under_way(server, mode)
    events = server.stream([asking.image(9)], asking.TEXT, max_new_tokens=200)
    next(events)
    events.close()  # type: ignore[attr-defined]
    nothing_under_way(server, mode)
    with asking.schedulers_stopped(server):
        before = asking.segments(server)
        request = asking.in_background(
            lambda: server.generate([asking.image(9)], asking.TEXT, max_new_tokens=2000)
        )
        on_its_way(server, mode, before)
        assert server.client.post("/abort_request", {"abort_all": True}).status == 200
    reply = request.result(asking.WAIT_S)
    assert "abort" in str(reply.body).lower(), reply
    nothing_under_way(server, mode)
    assert server.generate([asking.image()], asking.TEXT).status == 200


@both
def test_tensors_do_not_cross_the_loopback(version: str, mode: str, unpatched: Any, server: WatchedServer) -> None:
    """0.5.9 pickles whole tensors to the other rank; with the plugin only pointers go, as on later releases."""
    with by_its_way(server, mode):
        assert asking.bytes_between_ranks(server) < asking.TENSOR
    assert unpatched["tensors cross the loopback"] == (Version(version) < DEFERRED)
