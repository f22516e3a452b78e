"""A release with a /dev/shm of 64 MiB, Docker's default."""

from __future__ import annotations

from typing import Any

from devkit.images import jpeg
from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer

RELEASE = "0.5.12.post1"
SIZE = 64 << 20


def four_images(server: WatchedServer) -> Any:
    """Of 1280x720, whose features take more than that."""
    return server.generate([jpeg(1280, 720, seed=seed) for seed in range(4)], asking.TEXT)


@scenario(on=(RELEASE,))
def small_memory(version: str) -> Any:
    with WatchedServer(version, shm_bytes=SIZE) as server:
        reply = four_images(server)
        asking.wait_for(lambda: not server.alive(), "the engine's end")
        return {"answered": reply.status == 200, "ended by": server.exit_signal()}
