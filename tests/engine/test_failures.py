"""An unexpected error, in each place at which the engine calls mmlane.

docs/how-it-works.md, "When mmlane fails", has the rule: the tokenizer's side goes another way and says so once; a
rank fails the request, or ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.client import Reply
from tests.engine import asking, server_lanes
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

RELEASES = pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.18", "newest")
ENDS_S = 180.0  # from 0.5.14 on the main process waits a minute for core dumps

# The title of the process that sends requests: some of these functions are called in ranks, too.
TOKENIZER = "launch_server"
# What fails while requests are sent -> what its line begins with.
SENDING = {
    "mmlane.lane.producer:Lane.put": "put failed",
    "mmlane.lane.producer:Lane.copy": "put failed",
    "mmlane.transport.samples:Samples.put": "put failed",
    "mmlane.transport.samples:Samples.close": "share failed",
    "mmlane.transport.lane:Ticket.__init__": "put failed",
    "mmlane.engine.requests:Place.replace": "wrapping failed",
    "mmlane.engine.requests:own_items": "wrapping failed",
}


def failing_server(release: str, plugin: Path) -> WatchedServer:
    return WatchedServer(release, plugin=plugin, probes=["failures"], args=["--enable-metrics"])


@contextmanager
def failing(server: WatchedServer, *seams: str) -> Iterator[None]:
    file = server.notes / "fail"
    file.write_text("".join(f"{seam}\n" for seam in seams))
    try:
        yield
    finally:
        file.unlink()


def failed(server: WatchedServer, seam: str) -> int:
    """How many processes have failed there."""
    return sum(seam in file.read_text().splitlines() for file in server.notes.glob("*.failed"))


def one(server: WatchedServer) -> Reply:
    return server.generate([asking.image(1)], asking.TEXT)


def three(server: WatchedServer) -> Reply:
    return server.generate([asking.image(2)], asking.TEXT, n=3)


def said(server: WatchedServer, line: str, seam: str, error: str = "Injected") -> int:
    return len(re.findall(rf"mmlane: {line}: {error}: in {re.escape(seam)};", server.log()))


@RELEASES
def test_errors_while_it_serves(release: str, plugin_wheel: Path) -> None:
    with failing_server(release, plugin_wheel) as server:
        join = "mmlane.lane.reader:Reader.join"
        with failing(server, f"{join} Injected scheduler_TP1"):
            assert one(server).status == 200  # by segment
            asking.wait_for(lambda: said(server, "join failed", join) == 1, "the line of the rank")
        server_lanes.open_lanes(server)  # it tries again
        wanted = [asking.tokens(one(server)), asking.tokens(three(server))]
        seams = dict(SENDING)
        is_shared = Version(release) < Version("0.5.13")  # samples have items of their own by us alone
        if is_shared:
            seams["mmlane.engine.requests:own_items"] = "fan_out failed"
        for number, (seam, line) in enumerate(seams.items()):
            error = f"Injected{number}"  # the same kind of error at the same place is said once
            where = (line, seam, error)
            alone = is_shared and seam.endswith("own_items")
            with failing(server, f"{seam} {error} {TOKENIZER}"):
                replies = [one(server), *([] if alone else [three(server), three(server)])]
                # A copy is closed after the answer has gone.
                asking.wait_for(partial(said, server, *where), f"the line of {where}")
            for reply, tokens in zip(replies, [wanted[0], wanted[1], wanted[1]], strict=False):
                assert reply.status == 200, (seam, reply.body)
                assert asking.tokens(reply) == tokens, seam
            assert said(server, *where) == 1, seam

        # The way behind it fails as well: features go inline, or, from 0.5.21 on, by the engine's own class.
        with failing(
            server, "mmlane.lane.producer:Lane.put Injected", "mmlane.transport.segment_memory:store Injected"
        ):
            assert asking.tokens(one(server)) == wanted[0]
        with failing(server, "mmlane_patches.fan_out_images:_keep_together Injected"):
            assert asking.two_images_n2(server).status == 400  # as without mmlane
        write = "mmlane.transport.metrics:_write"
        with failing(server, f"{write} Injected"):
            asking.wait_for(lambda: said(server, "metrics failed", write) == 1, "the line of the metrics")
        counted = [f'mmlane_failures_total{{where="{where}"}}' for where in ("join", "put", "share", "metrics")]
        asking.wait_for(lambda: server_lanes.metrics(server).keys() >= set(counted), "the counts")
        server_lanes.wait_for_baseline(server)
        assert asking.tokens(one(server)) == wanted[0]

        # In a rank: a ticket's error fails its request, on all ranks; an unexpected error ends the rank.
        take = "mmlane.lane.reader:Reader.take"
        with failing(server, f"{take} StaleTicket"):
            server.loses()
            assert one(server).status == 500
            # One rank answers; another may come to it only now, and must find it failing, too.
            asking.wait_for(lambda: failed(server, take) == server.tp, "all ranks to fail")
        assert asking.tokens(three(server)) == wanted[1]
        server_lanes.wait_for_baseline(server)
        ranks = server.find("sglang::scheduler")
        server.breaks()
        with failing(server, f"{take} Injected scheduler_TP1"):
            answer = asking.in_background(lambda: one(server))
            asking.wait_for(lambda: not set(ranks) & {p.pid for p in server.processes()}, "the end", ENDS_S)
            server.stop()
            assert answer.result(asking.WAIT_S).status != 200
        assert server.log().count("mmlane: this rank ends, and the engine with it") == 1


@RELEASES
def test_errors_while_the_engine_starts(release: str, plugin_wheel: Path) -> None:
    """A process that cannot take part goes without the lane, and says so; images are answered all the same."""
    server = failing_server(release, plugin_wheel)
    seams = ("mmlane.transport.tokenizer_side:start", "mmlane_patches.leftovers:reclaim")
    with failing(server, *(f"{seam} Injected" for seam in seams)), server:
        assert one(server).status == 200
        assert three(server).status == 200
        assert said(server, "start failed", seams[0]) == 1
        assert said(server, "sweep failed", seams[1]) == 1
        assert server_lanes.lanes(server) == []


@RELEASES
def test_a_rank_that_cannot_join(release: str, plugin_wheel: Path) -> None:
    server = failing_server(release, plugin_wheel)
    start = "mmlane.transport.scheduler_side:start"
    with failing(server, f"{start} Injected scheduler_TP0"), server:
        assert one(server).status == 200
        assert three(server).status == 200
        assert said(server, "start failed", start) == 1
        asking.wait_for(lambda: server_lanes.lane(server).joined == {"dp0": [1]}, "the other rank")
        assert one(server).status == 200
        assert server_lanes.lane(server).state == "waiting"
