"""A session of two turns about one image, which is only sent with the first."""

from __future__ import annotations

from typing import Any

from devkit.client import IMAGE_SLOT, data_url
from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer

RELEASES = ("0.5.12.post1", "0.5.9", "0.5.16", "newest")
FEW_TOKENS = ("--max-total-tokens", "2048")


@scenario(on=RELEASES)
def session(version: str) -> Any:
    with WatchedServer(version, args=FEW_TOKENS) as server:
        return ask_in_a_session(server)


def ask_in_a_session(server: WatchedServer) -> list[list[list[int]]]:
    """The tokens of both answers."""
    opened = server.client.post("/open_session", {"capacity_of_str_len": 10_000})
    assert opened.status == 200, opened.body
    found = []
    rid = None
    for text, images in ((f"{IMAGE_SLOT}What is it?", [asking.image(12)]), (" And now?", [])):
        request: dict[str, Any] = {
            "text": text,
            "sampling_params": {"temperature": 0, "max_new_tokens": 8},
            "session_params": {"id": opened.body, "rid": rid},
        }
        if images:
            request["image_data"] = [data_url(picture) for picture in images]
        reply = server.client.post("/generate", request)
        assert reply.status == 200, reply.body
        found.append(asking.tokens(reply))
        rid = reply.body["meta_info"]["id"]
    server.client.post("/close_session", {"session_id": opened.body})
    return found
