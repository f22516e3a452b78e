"""The real engine, killed in the middle of a burst of image requests, and worn out by a thousand of all kinds."""

from __future__ import annotations

import concurrent.futures
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.client import Reply
from mmlane.lane.status import running
from tests.engine import scenarios
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

REQUESTS = 1000
SEED = 4
BURST = 8
GROWTH = 64 << 20  # bytes that a process may grow by in most of the soak, in which features of 900 MiB pass

VICTIMS: dict[str, Callable[[WatchedServer], list[int]]] = {
    "the first rank": lambda server: server.find("sglang::scheduler")[:1],
    "the last rank": lambda server: server.find("sglang::scheduler")[-1:],
    "the detokenizer": lambda server: server.find("sglang::detokenizer"),
    "the main process": lambda server: [server.pid],
}


@contextmanager
def burst(server: WatchedServer) -> Iterator[None]:
    """Requests of two images each that wait in front of stopped schedulers; their end is not looked at."""
    with concurrent.futures.ThreadPoolExecutor(BURST) as pool, scenarios.schedulers_stopped(server):
        for seed in range(BURST):
            images = [scenarios.image(seed), scenarios.image(seed + BURST)]
            pool.submit(server.generate, images, scenarios.TEXT)
        yield


def features_of_a_burst(release: str) -> int:
    """How many tickets there are then: 0.5.9 sends the images of a request as one feature."""
    return BURST if Version(release) < Version("0.5.10") else 2 * BURST


def end(server: WatchedServer, victims: list[int]) -> None:
    """Kill them, and then what the engine leaves running: nothing of it may need an orderly end."""
    for pid in victims:
        server.kill(pid, signal.SIGKILL)
    for process in server.processes():
        server.kill(process.pid, signal.SIGKILL)
    server.stop()


def lanes_of(pids: set[int]) -> list[str]:
    return [address for address in running() if int(address.split("-")[1]) in pids]


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "0.5.23")
def test_unpatched_killed_in_a_burst(release: str) -> None:
    """What it leaves in shared memory: the segments of every request that was under way."""
    with WatchedServer(release) as server:
        assert server.generate([scenarios.image()], scenarios.TEXT).status == 200
        before = scenarios.segments(server)
        with burst(server):
            scenarios.wait_for(lambda: len(scenarios.segments(server)) >= len(before) + BURST, "the segments")
            end(server, VICTIMS["the first rank"](server))
        assert len(scenarios.segments(server).keys() - before.keys()) >= BURST


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "0.5.23")
def test_killed_in_a_burst(release: str, plugin_wheel: Path) -> None:
    """Whoever dies: nothing is left, and it starts again at once."""
    features = features_of_a_burst(release)
    for name, victims in VICTIMS.items():
        with WatchedServer(release, plugin=plugin_wheel) as server:
            scenarios.open_lanes(server)
            before = scenarios.segments(server)
            pids = {process.pid for process in server.processes()}
            with burst(server):
                scenarios.wait_for(lambda: scenarios.lane(server).tickets >= features, "the tickets")
                assert scenarios.segments(server) == before, name
                end(server, victims(server))
            assert scenarios.segments(server).keys() <= before.keys(), name
            assert lanes_of(pids) == [], name


@pytest.mark.releases("0.5.12.post1", "0.5.23")
def test_the_end_of_a_rank_ends_the_engine(release: str, plugin_wheel: Path) -> None:
    """As it does without the plugin: nobody waits for a reader that is gone."""
    with WatchedServer(release, plugin=plugin_wheel) as server:
        scenarios.open_lanes(server)
        with burst(server) as _:
            features = features_of_a_burst(release)
            scenarios.wait_for(lambda: scenarios.lane(server).tickets >= features, "the tickets")
            pid = VICTIMS["the last rank"](server)[0]
            server.kill(pid, signal.SIGKILL)
        scenarios.wait_for(lambda: len(server.find("sglang::scheduler")) == 0, "the other rank's end", 180)


@pytest.mark.releases("0.5.18", "0.5.23")
def test_a_tokenizer_worker_is_killed(release: str, plugin_wheel: Path) -> None:
    """Its lane goes with it; the other worker's requests, and its lane, are as before."""
    with WatchedServer(release, plugin=plugin_wheel, args=["--tokenizer-worker-num", "2"]) as server:
        scenarios.open_lanes(server, 2)
        victim, survivor = scenarios.lanes(server)
        server.kill(victim.pid, signal.SIGKILL)
        scenarios.wait_for(lambda: lanes_of({victim.pid}) == [], "the lane's end")
        assert lanes_of({survivor.pid}) == [survivor.address]


# --- wearing it out ---


def one_of_many(server: WatchedServer, number: int, chance: random.Random) -> str:
    """A request of some kind, answered, aborted or hung up on; returns which kind."""
    kind = chance.choices(
        ["image", "two images", "text", "n", "chat", "stream", "hang up", "abort", "long", "wrong"],
        [30, 10, 10, 5, 10, 10, 10, 5, 5, 5],
    )[0]
    picture = scenarios.image(number % 50)
    if kind == "image":
        reply = server.generate([picture], f"Describe {number}.")
    elif kind == "two images":
        reply = server.generate([picture, scenarios.image(number % 7)], f"Compare {number}.")
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


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "0.5.23")
def test_a_thousand_requests(release: str, plugin_wheel: Path) -> None:
    """Of all kinds, with random aborts: the lane is empty after it, and no process has grown by what passed."""
    chance = random.Random(SEED)
    with (
        WatchedServer(release, plugin=plugin_wheel) as server,
        concurrent.futures.ThreadPoolExecutor(BURST) as pool,
    ):
        scenarios.open_lanes(server)

        def some(count: int) -> Counter[str]:
            seeds = [chance.randrange(1 << 30) for _ in range(count)]
            return Counter(pool.map(lambda seed: one_of_many(server, seed, random.Random(seed)), seeds))

        outcomes = some(REQUESTS * 3 // 10)  # caches fill
        before = anonymous_memory(server)
        outcomes += some(REQUESTS * 7 // 10)
        after = anonymous_memory(server)
        scenarios.wait_for_baseline(server)
        stats = scenarios.lane(server)
        assert stats.orphans == stats.strays == 0
        assert stats.refused.keys() <= {"not_open"}
        assert scenarios.features(server) == []
        grown = {pid: after[pid] - before[pid] for pid in before if after[pid] - before[pid] > GROWTH}
        assert not grown, f"{grown}, with {stats.copied} bytes copied, {outcomes}"
        assert server.generate([scenarios.image()], scenarios.TEXT).status == 200
