"""Every release: its answers, what it waits for, and which faults end it."""

from __future__ import annotations

from typing import Any

from devkit.client import Reply
from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer


@scenario("probes/probe_collectives.py")
def plain(version: str) -> Any:
    """Each kind of request, several samples, and a segment that is lost."""
    with WatchedServer(version, probes=["collectives"]) as server:
        answers = {name: answer(ask(server)) for name, ask in asking.ANSWERED.items()}
        waits = server.collectives() > 0
        crossed = asking.bytes_between_ranks(server)
        pictures = {str(seed): answer(server.generate([asking.image(seed)], asking.TEXT)) for seed in (4, 8)}
        several = asking.two_images_n2(server)
        samples = asking.one_image_n3(server)
        alive = survived(server, samples)
        lost = lost_segment(server) if alive else None
    if lost is None:
        with WatchedServer(version) as server:
            lost = lost_segment(server)
    return {
        "answers": answers,
        "pictures": pictures,
        "ranks wait for each other": waits,
        "tensors cross the loopback": crossed > asking.TENSOR,
        "several images, n=2": {"status": several.status, "names image_data": "image_data" in str(several.body)},
        "one image, n=3": {**(answer(samples) if samples.status == 200 else {}), "survived": alive},
        "lost segment": lost,
    }


def answer(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    return {"tokens": asking.tokens(reply), "texts": list(reply.texts)}


def lost_segment(server: WatchedServer) -> dict[str, bool]:
    reply = asking.ask_and_lose_the_segment(server)
    return {"answered": reply.status == 200, "survived": survived(server, reply)}


def survived(server: WatchedServer, reply: Reply) -> bool:
    """Whether the engine goes on serving; waits for its end when the connection broke."""
    if reply.status == 0:
        asking.wait_for(lambda: len(server.find("sglang::scheduler")) < server.tp, "a scheduler's end")
        return False
    return asking.ANSWERED["text only"](server).status == 200
