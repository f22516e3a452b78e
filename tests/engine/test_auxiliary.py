"""Tensors beside an item's feature, and embeddings that override a request's own, travel like features.

Models that have them cannot be served here: the engine's own items get made-up ones (`probes/probe_auxiliary.py`),
which go the whole way of a request.
"""

from __future__ import annotations

import concurrent.futures
import json
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from devkit.checkpoint import tiny_qwen2_5_vl
from tests.engine import asking, server_lanes
from tests.engine.unpatched.stages import ENV
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

BY_MESSAGES = ("0.5.19", "0.5.21")  # the other of the engine's two wires, whose types are the narrowest here
BYTES = 2 << 20  # of what an item gets
DECODING, AT_A_TIME = 100, 8  # requests, and how many of them are on their way
NEW, TOKENS = 2000, 1 << 18  # of each, so many that none ends soon; and room for those of all
STILL = 75  # of them decode when the last has begun to: enough to fill the lane, were it not for the copies
LANE_MIB = 256  # which has room for their features, and not for the auxiliary tensors, too


def notes(server: WatchedServer, kind: str) -> list[dict[str, Any]]:
    files = sorted(server.notes.glob(f"*.{kind}"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def all_arrived(server: WatchedServer, *, answers: int) -> None:
    """Every rank has got for each item what was made for it; with that many answers, and ranks of `tp`."""
    made = {tuple(note["digests"]) for note in notes(server, "made")}
    arrived = notes(server, "auxiliary")
    handled = Counter(note["rid"] for note in arrived)
    assert len(handled) >= answers and set(handled.values()) == {server.tp}, handled
    for note in arrived:
        assert {tuple(digests) for digests in note["digests"]} <= made, note
        assert all(count == [4, 2] for count in note["counts"])
        assert note["override"] is None or any(note["override"] == digests[0] for digests in made), note


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.10", "0.5.15", "0.5.18", "0.5.19", "0.5.21", "newest")
def test_they_travel_by_the_lane_and_hold_no_room(release: str, plugin_wheel: Path) -> None:
    """The engine keeps them until a request has ended: what a rank takes is a copy, so that others find room."""
    wire = {"SGLANG_USE_PICKLE_IPC": "0"} if release in BY_MESSAGES else {}
    env = {"MMLANE_CAPACITY_MB": str(LANE_MIB), **wire}
    args = ["--max-total-tokens", str(TOKENS)]
    with WatchedServer(release, plugin=plugin_wheel, probes=["auxiliary"], args=args, env=env) as server:
        assert asking.ANSWERED["two images"](server).status == 200  # inline: no rank has joined yet
        server_lanes.open_lanes(server)
        before = server_lanes.lane(server)
        assert asking.ANSWERED["one image"](server).status == 200
        # The feature, and of the auxiliary ones each.
        assert server_lanes.lane(server).puts >= before.puts + 5
        one = asking.tokens(server.generate([asking.image(4)], asking.TEXT))
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        assert asking.two_images_n2(server).status == 200
        assert asking.bytes_between_ranks(server) < BYTES

        with ExitStack() as stack:

            def decoding(seed: int) -> None:
                answer: Any = server.stream([asking.image(seed)], asking.TEXT, max_new_tokens=NEW, ignore_eos=True)
                stack.enter_context(closing(answer))
                next(answer)  # it has been prefilled

            with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
                list(pool.map(decoding, range(DECODING)))
            during = server_lanes.lane(server)
            assert during.fallbacks == before.fallbacks
            # The features, which a CPU keeps as well, of those that have not come to their end yet.
            assert STILL <= during.extents <= DECODING + 1, during
        server_lanes.wait_for_baseline(server)
        all_arrived(server, answers=DECODING + 8)
        assert server_lanes.features(server) == []


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.12.post1")
def test_they_travel_inline_where_there_is_no_lane(release: str, plugin_wheel: Path) -> None:
    env = {"MMLANE": "backport"}
    with WatchedServer(release, plugin=plugin_wheel, probes=["auxiliary"], env=env) as server:
        for ask in asking.ANSWERED.values():
            assert ask(server).status == 200
        assert asking.one_image_n3(server).status == 200
        all_arrived(server, answers=8)


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.12.post1")
def test_later_pipeline_stages_get_them(release: str, plugin_wheel: Path) -> None:
    args = ["--model-path", str(tiny_qwen2_5_vl()), "--pp-size", "2"]
    with WatchedServer(release, plugin=plugin_wheel, probes=["auxiliary"], args=args, env=ENV) as server:
        server_lanes.open_lanes(server)
        assert asking.ANSWERED["two images"](server).status == 200
        made = {tuple(note["digests"]) for note in notes(server, "made")}
        arrived = notes(server, "auxiliary")
        assert {note["stage"] for note in arrived} == {0, 1}
        assert {tuple(digests) for note in arrived for digests in note["digests"]} == made
        server_lanes.wait_for_baseline(server)
