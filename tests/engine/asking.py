"""What a server is asked, and what is done to it at the same time, with the plugin and without.

A change of this file makes every transcript of an unpatched release out of date (transcripts.py): what concerns
the plugin alone is in server_lanes.py.
"""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devkit.client import IMAGE_SLOT, Reply, data_url
from devkit.images import jpeg
from tests.engine.watching import WatchedServer

WAIT_S = 60.0  # for what happens at once when it happens at all; only a fault takes that long
TEXT = "Describe it."
IMAGE = (320, 240)
TENSOR = 640 * 480 * 3 * 4 // 2  # bytes; a lower bound for the float32 patches of a 640x480 image
BURST = 8


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


def wait_for(condition: Callable[[], object], what: str | Callable[[], str], seconds: float = WAIT_S) -> None:
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
        resume(server)


def resume(server: WatchedServer) -> None:
    """Let the schedulers that were stopped go on."""
    for pid in server.find("sglang::scheduler"):
        server.kill(pid, signal.SIGCONT)


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
    wait_for(lambda: answer.done() or not all_run(server, pids), "a reply, or the end of a scheduler")
    return answer.result(WAIT_S) if all_run(server, pids) else Reply(0, {"error": "a scheduler has ended"})


def all_run(server: WatchedServer, pids: list[int]) -> bool:
    """Whether all these processes of the server run."""
    return set(pids) <= {process.pid for process in server.processes()}


def bytes_between_ranks(server: WatchedServer) -> int:
    """What an image of 640x480 makes them send each other. The least of three, as others may send, too."""

    def once() -> int:
        before = loopback_bytes()
        ANSWERED["larger image"](server)
        return loopback_bytes() - before

    return min(once() for _ in range(3))


def loopback_bytes() -> int:
    """Bytes that have crossed this machine's loopback interface: the schedulers' gloo broadcast among them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise LookupError("no loopback interface in /proc/net/dev")


@contextmanager
def burst(server: WatchedServer) -> Iterator[None]:
    """Requests of two images each that wait in front of stopped schedulers; their end is not looked at."""
    with concurrent.futures.ThreadPoolExecutor(BURST) as pool, schedulers_stopped(server):
        for seed in range(BURST):
            pool.submit(server.generate, [image(seed), image(seed + BURST)], TEXT)
        yield


def kill_all(server: WatchedServer, victims: list[int]) -> None:
    """Kill them, and then what the engine leaves running: nothing of it may need an orderly end."""
    for pid in victims:
        server.kill(pid, signal.SIGKILL)
    for process in server.processes():
        server.kill(process.pid, signal.SIGKILL)
    server.stop()
