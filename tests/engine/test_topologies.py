"""Data parallelism and several tokenizer workers: other processes, other relays, the same promises."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

import pytest

from devkit.images import jpeg
from devkit.server import EngineServer
from tests.engine import scenarios

pytestmark = pytest.mark.engine

DEBUG = {"MMLANE_LOG": "debug"}


def roles(server: EngineServer) -> list[str]:
    return sorted(re.findall(r"mmlane: \[\d+\] (\w+): sglang", server.log()))


def everything_is_answered(server: EngineServer) -> None:
    """Each kind of request, several times over and at once, so that every replica and worker gets its share."""
    asks = [*scenarios.ANSWERED.values(), scenarios.one_image_n3, scenarios.two_images_n2] * 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {reply.status for reply in pool.map(lambda ask: ask(server), asks)} == {200}
    lost = scenarios.ask_and_lose_the_segment(server)
    assert lost.status == 500, lost.body
    assert scenarios.ANSWERED["one image"](server).status == 200

    def features() -> list[str]:
        return [name for name in server.shm_listing() if name.startswith(("mmlane_", "sgl_shm_mm"))]

    scenarios.wait_for(lambda: features() == [], lambda: f"{features()} to go")


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "0.5.23")
def test_data_parallel(release: str, plugin_wheel: Path) -> None:
    """The data-parallel controller unpickles every pointer and pickles it again."""
    with EngineServer(release, plugin=plugin_wheel, tp=1, args=["--dp", "2"], env=DEBUG) as server:
        everything_is_answered(server)
        assert roles(server) == ["detokenizer", "dp_controller", "main", "scheduler", "scheduler"]


@pytest.mark.releases("0.5.18", "0.5.9", "0.5.12.post1", "0.5.23")
def test_two_tokenizer_workers(release: str, plugin_wheel: Path) -> None:
    """Two producers, and a main process that only manages them. 0.5.18 is the newest with every kind of patch."""
    arguments = ["--tokenizer-worker-num", "2"]
    with EngineServer(release, plugin=plugin_wheel, args=arguments, env=DEBUG) as server:
        # One worker is enough for the server to be ready; both shall serve.
        scenarios.wait_for(lambda: roles(server).count("tokenizer") == 2, lambda: f"both workers: {roles(server)}")
        everything_is_answered(server)
        assert {"main", "scheduler", "detokenizer"} <= set(roles(server))


def test_64_mib_of_shared_memory(plugin_wheel: Path) -> None:
    """Docker's default: four 1280x720 images are a bus error without the plugin, and an answer with it."""
    four = [jpeg(1280, 720, seed=seed) for seed in range(4)]
    with EngineServer("0.5.12.post1", shm_bytes=64 << 20) as server:
        reply = server.generate(four, scenarios.TEXT)
        assert reply.status == 0
        scenarios.wait_for(lambda: not server.alive(), "the engine's end")
        assert server.exit_signal() == "SIGBUS"
    flags = ["--mmlane", "backport", "--mmlane-strict"]
    with EngineServer("0.5.12.post1", plugin=plugin_wheel, shm_bytes=64 << 20, args=flags, env=DEBUG) as server:
        reply = server.generate(four, scenarios.TEXT)
        assert reply.status == 200, reply.body
        # The flags did not disturb the engine's parser, and reached every process.
        assert set(re.findall(r"mmlane: \[\d+\] \w+: sglang \S+, mode (\w+)", server.log())) == {"backport"}
        assert len(roles(server)) == 4
        assert server.log().count("docker run --shm-size") == 1
        assert scenarios.ANSWERED["one image"](server).status == 200
