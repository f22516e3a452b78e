"""A release that serves the model as one of embeddings."""

from __future__ import annotations

from typing import Any

from devkit.client import IMAGE_SLOT, data_url
from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer

RELEASES = ("newest", "0.5.9", "0.5.12.post1", "0.5.16")
AS_EMBEDDING = ("--is-embedding",)
SEEDS = (13, 14)


@scenario(on=RELEASES)
def embeddings(version: str) -> Any:
    with WatchedServer(version, args=AS_EMBEDDING) as server:
        return [[round(number, 7) for number in embedding(server, seed)] for seed in SEEDS]


def embedding(server: WatchedServer, seed: int) -> list[float]:
    """Of one image and a few words."""
    body = {"text": f"{IMAGE_SLOT}What is it?", "image_data": [data_url(asking.image(seed))]}
    reply = server.client.post("/encode", body)
    assert reply.status == 200, reply.body
    found: list[float] = reply.body["embedding"]
    return found
