"""A release of two pipeline stages with two ranks each: the second gets its requests from the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devkit.checkpoint import tiny_qwen2_5_vl
from tests.engine import asking
from tests.engine.transcripts import scenario
from tests.engine.watching import WatchedServer

# Before 0.5.11 the engine makes CUDA events in this loop, whatever the device.
RELEASES = ("0.5.12.post1", "0.5.11", "0.5.14", "0.5.16", "0.5.18", "0.5.19", "newest")
ENV = {
    "MMLANE_LOG": "debug",
    # Four ranks start one by one on memory that others use as well.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}


def two_stages(release: str, plugin: Path | None = None, mode: str = "off") -> WatchedServer:
    """A server of a model that the engine can split."""
    args = ["--model-path", str(tiny_qwen2_5_vl()), "--pp-size", "2"]
    return WatchedServer(release, plugin=plugin, args=args, env={**ENV, "MMLANE": mode})


@scenario(on=RELEASES)
def stages(version: str) -> Any:
    with two_stages(version) as server:
        assert len(server.find("sglang::scheduler_PP1")) == 2
        before = set(asking.segments(server))  # the engine's own queues, under the same names
        found = {
            "answers": answers(server),
            "tensors cross twice": asking.bytes_between_ranks(server) > 2 * asking.TENSOR,
        }
        wait_for_no_new_segments(server, before)
    return found


def answers(server: WatchedServer) -> dict[str, list[list[int]]]:
    """The tokens of each plain request, the image kinds among them."""
    replies = {name: ask(server) for name, ask in asking.ANSWERED.items()}
    assert {name: reply.status for name, reply in replies.items()} == dict.fromkeys(replies, 200)
    return {name: asking.tokens(reply) for name, reply in replies.items()}


def wait_for_no_new_segments(server: WatchedServer, before: set[str]) -> None:
    def new() -> set[str]:
        return set(asking.segments(server)) - before

    asking.wait_for(lambda: not new(), lambda: f"{new()} to go")
