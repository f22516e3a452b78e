"""The requests that the engine tests make, and what they do to a running server besides asking it."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from devkit.client import IMAGE_SLOT, Reply, data_url
from devkit.images import jpeg
from mmlane.lane.status import LaneStats, ask, running
from tests.engine.watching import WatchedServer

WAIT_S = 60.0  # for what happens at once when it happens at all; only a fault takes that long
TEXT = "Describe it."
IMAGE = (320, 240)


def image(seed: int = 0) -> bytes:
    return jpeg(*IMAGE, seed=seed)


def tokens(reply: Reply) -> list[list[int]]:
    """The output token ids of each answer of a native reply."""
    answers = reply.body if isinstance(reply.body, list) else [reply.body]
    return [answer["output_ids"] for answer in answers]


# Requests that every unpatched release answers: the plugin may not change a token of them.
ANSWERED: dict[str, Callable[[WatchedServer], Reply]] = {
    "one image": lambda s: s.generate([image()], TEXT),
    "text only": lambda s: s.generate([], TEXT),
    "two images": lambda s: s.generate([image(1), image(2)], TEXT),
    "larger image": lambda s: s.generate([jpeg(640, 480, seed=3)], TEXT),
    "text only, n=3": lambda s: s.generate([], TEXT, n=3),
    "batch of three": lambda s: batch(s, 3),
}


def batch(server: WatchedServer, count: int) -> Reply:
    """One native request with several prompts, an image each."""
    return server.client.post(
        "/generate",
        {
            "text": [IMAGE_SLOT + TEXT] * count,
            "image_data": [data_url(image(seed)) for seed in range(count)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 8},
        },
    )


def one_image_n3(server: WatchedServer) -> Reply:
    return server.generate([image(4)], TEXT, n=3)


def two_images_n2(server: WatchedServer) -> Reply:
    return server.chat([image(5), image(6)], TEXT, n=2)


def in_background(call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    return concurrent.futures.ThreadPoolExecutor(1).submit(call)


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str], seconds: float = WAIT_S) -> None:
    """Wait for something outside this process that gives no event, as a file or a process elsewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.01)


@contextmanager
def schedulers_stopped(server: WatchedServer) -> Iterator[list[int]]:
    """Hold every scheduler by SIGSTOP, so that what is under way to them stays there."""
    pids = server.find("sglang::scheduler")
    assert pids, [p.title for p in server.processes()]
    for pid in pids:
        server.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            server.kill(pid, signal.SIGCONT)


@contextmanager
def asked_and_left(server: WatchedServer, picture: bytes, **sampling: Any) -> Iterator[None]:
    """A streamed request whose user hangs up at the end of the block, having read nothing."""
    body = {
        "text": IMAGE_SLOT + TEXT,
        "image_data": [data_url(picture)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, **sampling},
        "stream": True,
    }
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=WAIT_S)) as connection:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        yield


@contextmanager
def flag(server: WatchedServer, name: str) -> Iterator[None]:
    """While inside, a probe finds the file $NOTES/NAME and acts on it: `hold`, `uncollected`."""
    file = server.notes / name
    file.touch()
    try:
        yield
    finally:
        file.unlink()


def segments(server: WatchedServer) -> dict[str, int]:
    """The feature segments in the server's /dev/shm: the engine's and ours."""
    return {
        name: size
        for name, size in server.shm_listing().items()
        if name.startswith(("psm_", "sgl_shm_mm", "mmlane_"))
    }


def ask_and_lose_the_segment(server: WatchedServer) -> Reply:
    """Ask about an image, and unlink its segment while it is on its way to the schedulers."""
    server.loses()
    with schedulers_stopped(server) as pids:
        before = segments(server)
        answer = in_background(lambda: server.generate([image(7)], TEXT))
        wait_for(lambda: bool(set(segments(server)) - set(before)), "the request's segment")
        for name in set(segments(server)) - set(before):
            Path("/proc", str(server.pid), "root/dev/shm", name).unlink()
    # From 0.5.14 on the main process outlives a scheduler by a minute, for core dumps, and answers nothing.
    wait_for(lambda: answer.done() or not run(server, pids), "a reply, or the end of a scheduler")
    return answer.result(WAIT_S) if run(server, pids) else Reply(0, {"error": "a scheduler has ended"})


def metrics(server: WatchedServer) -> dict[str, float]:
    """Our numbers in the engine's own /metrics, which are written once a second."""
    lines = re.findall(r"^(mmlane_\S+) (\S+)$", str(server.client.get("/metrics").body), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def states(server: WatchedServer) -> dict[str, float]:
    """How many tokenizers have their lane in which state."""
    found = {name: count for name, count in metrics(server).items() if name.startswith("mmlane_lanes{")}
    return {name.split('"')[1]: count for name, count in found.items() if count}


def features(server: WatchedServer) -> list[str]:
    """The feature segments in the server's /dev/shm that are named as such.

    Not every segment: the engine keeps queues between its processes there, named psm_ on older releases.
    """
    return [name for name in server.shm_listing() if name.startswith(("mmlane_", "sgl_shm_mm_"))]


def wait_for_no_features(server: WatchedServer) -> None:
    wait_for(lambda: features(server) == [], lambda: f"{features(server)} to go")


def lanes(server: WatchedServer) -> list[LaneStats]:
    """The lanes of a server's processes, as they are now."""
    pids = {process.pid for process in server.processes()}
    return [ask(address, WAIT_S) for address in running() if int(address.split("-")[1]) in pids]


def lane(server: WatchedServer) -> LaneStats:
    """The one lane of a server with one tokenizer process."""
    (found,) = lanes(server)
    return found


def open_lanes(server: WatchedServer, count: int = 1) -> None:
    """Send images until that many producers have an open lane each."""

    def all_open() -> bool:
        assert server.generate([image()], TEXT).status == 200
        return sum(stats.is_open for stats in lanes(server)) == count

    wait_for(all_open, lambda: f"{count} open lanes: {lanes(server)}")


def wait_for_baseline(server: WatchedServer) -> None:
    """Wait until every ticket has come back, and nothing is kept for anybody."""

    def at_baseline() -> bool:
        return all((stats.tickets, stats.extents, stats.taken) == (0, 0, 0) for stats in lanes(server))

    wait_for(at_baseline, lambda: f"the lanes to be empty: {lanes(server)}")


def run(server: WatchedServer, pids: list[int]) -> bool:
    """Whether all these processes of the server run."""
    return set(pids) <= {process.pid for process in server.processes()}


def loopback_bytes() -> int:
    """Bytes that have crossed this machine's loopback interface: the schedulers' gloo broadcast among them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise LookupError("no loopback interface in /proc/net/dev")
