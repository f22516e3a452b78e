"""What the tests see of mmlane in a running server, and how they bring its lane into a state."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from devkit.client import IMAGE_SLOT, data_url
from mmlane.lane.status import LaneStats, ask, running
from tests.engine.asking import TEXT, WAIT_S, image, wait_for
from tests.engine.watching import WatchedServer


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
    return [ask(name, WAIT_S) for name in names(pids)]


def names(pids: set[int]) -> list[str]:
    """Of the lanes that are there of these processes."""
    return [name for name in running() if int(name.split("-")[1]) in pids]


def lane(server: WatchedServer) -> LaneStats:
    """The one lane of a server with one tokenizer process."""
    (found,) = lanes(server)
    return found


def open_lanes(server: WatchedServer, count: int = 1) -> None:
    """Send images until that many producers have an open lane each."""

    def all_open() -> bool:
        assert server.generate([image()], TEXT).status == 200
        return sum(stats.state == "open" for stats in lanes(server)) == count

    wait_for(all_open, lambda: f"{count} open lanes: {lanes(server)}")


def wait_for_baseline(server: WatchedServer) -> None:
    """Wait until every ticket has been released, and no memory is kept."""

    def at_baseline() -> bool:
        return all((stats.tickets, stats.extents, stats.used_bytes) == (0, 0, 0) for stats in lanes(server))

    wait_for(at_baseline, lambda: f"the lanes to be empty: {lanes(server)}")
