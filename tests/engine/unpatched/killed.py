"""A release whose rank is killed in the middle of a burst: what it leaves in shared memory."""

from __future__ import annotations

from typing import Any

from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer

RELEASES = ("0.5.12.post1", "0.5.9", "0.5.16", "newest")


@scenario(on=RELEASES)
def killed_in_a_burst(version: str) -> Any:
    """Whether a segment is left of every request that was under way."""
    with WatchedServer(version) as server:
        assert server.generate([asking.image()], asking.TEXT).status == 200
        before = asking.segments(server)
        with asking.burst(server):
            asking.wait_for(lambda: len(asking.segments(server)) >= len(before) + asking.BURST, "the segments")
            asking.kill_all(server, server.find("sglang::scheduler")[:1])
        return {"leaves segments": len(asking.segments(server).keys() - before.keys()) >= asking.BURST}
