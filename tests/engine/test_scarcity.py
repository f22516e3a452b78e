"""What users have reported of engines that are short of something: shared memory, room for tokens, a queue."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from devkit.client import Reply
from devkit.images import jpeg
from devkit.sharedmemory import can_be_private
from tests.engine import asking, server_lanes
from tests.engine.asking import image
from tests.engine.field_reports import nothing_left, on
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

LANE_MB, SHM = 16, 32 << 20
# Without the engine's caches, what is prefilled again is computed from the features again.
NO_CACHES = ("--disable-radix-cache",), {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
# The engine lets so many requests run at once that they cannot all end.
FEW_TOKENS = ("--max-total-tokens", "1024", "--schedule-conservativeness", "0.3")


def sent(server: WatchedServer) -> int:
    """How many features have been sent by lane or otherwise."""
    stats = server_lanes.lane(server)
    return stats.puts + sum(stats.fallbacks.values())


@contextmanager
def at_once(server: WatchedServer, pictures: Sequence[bytes]) -> Iterator[list[concurrent.futures.Future[Reply]]]:
    """Requests about a picture each, all of them sent and none taken inside; after it, they are answered."""
    with concurrent.futures.ThreadPoolExecutor(len(pictures)) as pool, asking.schedulers_stopped(server):
        before = sent(server)
        asks = [pool.submit(server.generate, [picture], asking.TEXT) for picture in pictures]
        wanted = before + len(pictures)
        asking.wait_for(lambda: sent(server) == wanted, lambda: f"{wanted} features, not {sent(server)}")
        yield asks


@on("0.5.14")
def test_little_memory_and_little_room_for_tokens(release: str, plugin_wheel: Path) -> None:
    arguments, env = NO_CACHES
    with WatchedServer(
        release,
        plugin=plugin_wheel,
        args=[*arguments, *FEW_TOKENS],
        env={"MMLANE_CAPACITY_MB": str(LANE_MB), **env},
        shm_bytes=SHM if can_be_private() else None,
    ) as server:
        server_lanes.open_lanes(server)
        a_burst_that_finds_no_room(server)
        requests_that_are_retracted(server)


def a_burst_that_finds_no_room(server: WatchedServer) -> None:
    """24 images of 7 MiB: the lane has room for two of them, /dev/shm for four, and the others go inline."""
    pictures = [jpeg(640, 480, seed=seed) for seed in range(6)]
    right = [asking.tokens(server.generate([picture], asking.TEXT)) for picture in pictures]
    nothing_left(server)
    before = server_lanes.lane(server).puts
    with at_once(server, pictures * 4) as asks:
        by_lane = server_lanes.lane(server).puts - before
        by_segment = len(server_lanes.features(server))
    assert by_lane > 0 and by_segment > 0
    if can_be_private():
        assert by_lane + by_segment < len(asks)
    replies = [ask.result() for ask in asks]
    assert [reply.status for reply in replies] == [200] * len(replies)
    assert [asking.tokens(reply) for reply in replies] == right * 4
    nothing_left(server)


def requests_that_are_retracted(server: WatchedServer) -> None:
    """The engine takes back what it has decoded of some, and computes it again from their features, later."""
    length = {"max_new_tokens": 200}  # this model never ends early
    one_by_one = [server.generate([image(seed)], asking.TEXT, **length).texts[0] for seed in range(4)]
    assert retractions(server) == 0
    streams = []
    # One after the other: of those that come together, the engine makes sure that all can end.
    for seed in range(4):
        streams.append(server.stream([image(seed)], asking.TEXT, **length))
        next(streams[-1])
    ends = [asking.in_background(partial(list, events)) for events in streams]
    together = [end.result(asking.WAIT_S)[-1]["text"] for end in ends]
    assert retractions(server) > 0
    assert together == one_by_one
    nothing_left(server)


def retractions(server: WatchedServer) -> int:
    return sum(map(int, re.findall(r"#retracted_reqs: (\d+)", server.log())))


@on("newest")
def test_a_queue_that_is_full(release: str, plugin_wheel: Path) -> None:
    """The engine refuses what comes then with 503; the lane is empty after it, and the next is answered."""
    with WatchedServer(release, plugin=plugin_wheel, tp=1, args=["--max-queued-requests", "2"]) as server:
        server_lanes.open_lanes(server)
        pictures = [image(seed) for seed in range(4)]
        right = [asking.tokens(server.generate([picture], asking.TEXT)) for picture in pictures]
        nothing_left(server)
        with at_once(server, pictures * 4) as asks:
            assert server_lanes.lane(server).tickets == len(asks)
        replies = [ask.result() for ask in asks]
        assert {reply.status for reply in replies} == {200, 503}
        for reply, tokens in zip(replies, right * 4, strict=True):
            assert reply.status == 503 or asking.tokens(reply) == tokens
        nothing_left(server)
        assert asking.tokens(server.generate([pictures[0]], asking.TEXT)) == right[0]


@on("0.5.18")
def test_aborts_with_two_tokenizer_workers(release: str, plugin_wheel: Path) -> None:
    """By name, of a request of each worker, while it is decoded."""
    probes = ["patience"] if Version(release) < Version("0.5.12") else []
    arguments = ["--tokenizer-worker-num", "2"]
    with WatchedServer(release, probes=probes, plugin=plugin_wheel, args=arguments) as server:
        server_lanes.open_lanes(server, 2)
        nothing_left(server)
        aborts_by_name(server)
        nothing_left(server)
        assert asking.ANSWERED["one image"](server).status == 200


def aborts_by_name(server: WatchedServer) -> None:
    streams: dict[str, Iterator[Any]] = {}

    def both_serve() -> bool:
        events = server.stream([image(len(streams))], asking.TEXT, max_new_tokens=8000, ignore_eos=True)
        streams[next(events)["meta_info"]["id"]] = events
        return all(stats.tickets for stats in server_lanes.lanes(server))

    asking.wait_for(both_serve, lambda: f"a request of each worker: {server_lanes.lanes(server)}")
    ends = {name: asking.in_background(partial(list, events)) for name, events in streams.items()}

    def ended(name: str) -> bool:
        # Whichever worker gets this: many releases pass over the names of another's requests.
        assert server.client.post("/abort_request", {"rid": name}).status == 200
        return ends[name].done()

    for name, end in ends.items():
        asking.wait_for(partial(ended, name), f"the end of {name}")
        *_, last = end.result()
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
