"""Launches on one node in which the engine sends features inside of their requests: with mmlane they travel."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devkit.checkpoint import tiny_qwen2_5_vl
from devkit.client import Reply, data_url
from devkit.images import jpeg
from devkit.server import EngineServer, dies_with_us, free_port
from devkit.sharedmemory import can_be_private, privately
from tests.engine import asking, server_lanes
from tests.engine.test_topologies import MODES, modes
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.stages import ENV, answers, stages
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

# A prompt as its tokens: an image's place each, and the bytes of a word.
IMAGE_TOKENS = [265, 268, 266]
WORD = list(b"Describe it.")


def by_tokens(server: WatchedServer, images: list[bytes], **sampling: object) -> Reply:
    """A native request without text, as trainers send them."""
    request = {
        "input_ids": IMAGE_TOKENS * len(images) + WORD,
        "image_data": [data_url(image) for image in images],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **sampling},
    }
    return server._counted(images, server.client.post("/generate", request))


@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18", "0.5.21")
def test_without_a_tokenizer(release: str, plugin_wheel: Path) -> None:
    """--skip-tokenizer-init: the engine neither makes pointers nor takes them."""
    args = ["--skip-tokenizer-init"]
    five = [asking.image(seed) for seed in range(5)]
    with WatchedServer(release, plugin=plugin_wheel, args=args) as server:
        inline = by_tokens(server, five)  # with the invitation to the lane
        assert inline.status == 200, inline.body
        asking.wait_for(lambda: server_lanes.lane(server).state == "open", "the lane")
        before = server_lanes.lane(server)
        assert asking.tokens(by_tokens(server, five)) == asking.tokens(inline)
        one = asking.tokens(by_tokens(server, [asking.image(7)]))
        assert asking.tokens(by_tokens(server, [asking.image(7)], n=3)) == one * 3
        after = server_lanes.lane(server)
        assert after.puts > before.puts and after.fallbacks == before.fallbacks
        assert larger_between_ranks(server) < asking.TENSOR
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asks = [pool.submit(by_tokens, server, [asking.image(seed)]) for seed in range(24)]
            assert {ask.result().status for ask in asks} == {200}
        server_lanes.wait_for_baseline(server)
        assert server_lanes.features(server) == []


def larger_between_ranks(server: WatchedServer) -> int:
    def once() -> int:
        before = asking.loopback_bytes()
        assert by_tokens(server, [jpeg(640, 480, seed=3)]).status == 200
        return asking.loopback_bytes() - before

    return min(once() for _ in range(3))


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.12.post1")
def test_without_a_tokenizer_and_without_the_lane(release: str, plugin_wheel: Path) -> None:
    """By no segment, which no rank would take: inline, each image at its own size."""
    env = {"MMLANE_CAPACITY_MB": "1"}  # smaller than a feature
    five = [asking.image(seed) for seed in range(5)]
    for mode in ("lane", "backport"):
        with WatchedServer(
            release, plugin=plugin_wheel, args=["--skip-tokenizer-init"], env={**env, "MMLANE": mode}
        ) as server:
            replies = [by_tokens(server, five) for _ in range(3)]
            assert {reply.status for reply in replies} == {200}
            assert len({str(asking.tokens(reply)) for reply in replies}) == 1
            assert server_lanes.features(server) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.18", "newest")
def test_an_address_for_the_ranks(release: str, mode: str, plugin_wheel: Path) -> None:
    """On one node, too, some give one. Up to 0.5.18 the engine takes it for several nodes."""
    arguments = ["--dist-init-addr", f"127.0.0.1:{free_port()}", "--enable-metrics"]
    with WatchedServer(release, plugin=plugin_wheel, args=arguments, env={"MMLANE": mode}) as server:
        modes(server, mode, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.releases("newest", "0.5.10", "0.5.12.post1", "0.5.19")
def test_inputs_made_ready_by_one_rank(release: str, mode: str, plugin_wheel: Path) -> None:
    """--enable-broadcast-mm-inputs-process: with the lane each rank has them, and nothing is sent to others."""
    arguments = ["--enable-broadcast-mm-inputs-process"]
    with WatchedServer(release, plugin=plugin_wheel, args=arguments, env={"MMLANE": mode}) as server:
        modes(server, mode, 1)
        crossing = asking.bytes_between_ranks(server)
        assert (crossing < asking.TENSOR) is (mode == "lane"), crossing


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.12.post1", "0.5.16")
def test_a_node_for_each_pipeline_stage(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """Over two nodes, here on one machine: the first stage is on the tokenizer's, and has the lane."""
    address = f"127.0.0.1:{free_port()}"
    wanted = transcripts.of(release, stages)["answers"]
    nodes = ["--nnodes", "2", "--node-rank", "0", "--dist-init-addr", address]
    args = ["--model-path", str(tiny_qwen2_5_vl()), "--pp-size", "2", *nodes]
    server = WatchedServer(release, plugin=plugin_wheel, args=args, env=ENV)
    with other_node(server), server:
        server_lanes.open_lanes(server)
        assert server_lanes.lane(server).joined == {"dp0": [0, 1]}
        before = server_lanes.lane(server)
        assert answers(server) == wanted
        after = server_lanes.lane(server)
        assert after.puts > before.puts and after.fallbacks == before.fallbacks
        server_lanes.wait_for_baseline(server)


@contextmanager
def other_node(server: EngineServer) -> Iterator[None]:
    """The launch of the second node, with a /dev/shm of its own; it ends with the block."""
    command = [*dies_with_us(), *server._command(free_port()), "--node-rank", "1"]
    if can_be_private():
        command = privately(command, 8 << 30)
    process = subprocess.Popen(
        command,
        env=server._environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its children have its group
        process.wait(60)
