"""A server that is worn out by a thousand requests of all kinds."""

from __future__ import annotations

import concurrent.futures
import random
from collections import Counter
from pathlib import Path

import pytest

from devkit.client import Reply
from tests.engine import asking, server_lanes
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

REQUESTS = 1000
AT_ONCE = 8
SEED = 4
GROWTH = 64 << 20  # bytes that a process may grow by in most of the soak, in which features of 900 MiB pass


def one_of_many(server: WatchedServer, number: int, chance: random.Random) -> str:
    """A request of some kind, answered, aborted or hung up on; returns which kind."""
    kind = chance.choices(
        ["image", "two images", "text", "n", "chat", "stream", "hang up", "abort", "long", "wrong"],
        [30, 10, 10, 5, 10, 10, 10, 5, 5, 5],
    )[0]
    picture = asking.image(number % 50)
    if kind == "image":
        reply = server.generate([picture], f"Describe {number}.")
    elif kind == "two images":
        reply = server.generate([picture, asking.image(number % 7)], f"Compare {number}.")
    elif kind == "text":
        reply = server.generate([], f"Say {number}.")
    elif kind == "n":
        reply = server.generate([picture], f"Describe {number}.", n=4)
    elif kind == "chat":
        reply = server.chat([picture], f"Describe {number}.")
    elif kind in ("stream", "hang up"):
        events = server.stream([picture], f"Describe {number}.", max_new_tokens=8 if kind == "stream" else 300)
        for _ in events:
            if kind == "hang up":
                events.close()  # type: ignore[attr-defined]
                break
        return kind
    elif kind == "abort":
        server.client.post("/abort_request", {"abort_all": True})
        return kind
    elif kind == "long":  # more than one chunk of prefill
        reply = server.generate([picture], f"{number} " + "word " * 600)
    else:  # longer than the model's context: the scheduler refuses it
        reply = server.generate([picture], "word " * 40_000)
    assert isinstance(reply, Reply)
    return kind if reply.status == 200 else f"{kind}: {reply.status}"


def anonymous_memory(server: WatchedServer) -> dict[int, int]:
    """Bytes of private memory of each of a server's processes."""
    found = {}
    for process in server.processes():
        status = Path(f"/proc/{process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
        found[process.pid] = int(line.split()[1]) << 10
    return found


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "newest")
def test_a_thousand_requests(version: str, lane_server: WatchedServer) -> None:
    """Of all kinds, with random aborts: the lane is empty after it, and no process has grown by what passed."""
    chance = random.Random(SEED)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        server_lanes.open_lanes(lane_server)

        def some(count: int) -> Counter[str]:
            seeds = [chance.randrange(1 << 30) for _ in range(count)]
            return Counter(pool.map(lambda seed: one_of_many(lane_server, seed, random.Random(seed)), seeds))

        outcomes = some(REQUESTS * 3 // 10)  # caches fill
        before = anonymous_memory(lane_server)
        outcomes += some(REQUESTS * 7 // 10)
        after = anonymous_memory(lane_server)
    server_lanes.wait_for_baseline(lane_server)
    grown = {pid: after[pid] - before[pid] for pid in before if after[pid] - before[pid] > GROWTH}
    assert not grown, f"{grown}, with {server_lanes.lane(lane_server).copied_bytes} bytes copied, {outcomes}"
    assert server_lanes.features(lane_server) == []
    assert lane_server.generate([asking.image()], asking.TEXT).status == 200
