"""The package goes, or another version takes its place, under a running engine, which reads nothing from it.

Some processes of some releases import a module of the engine with the first request only (0.5.12.post1: the
schedulers, the tokenizer manager). What of ours patches it has been loaded by then.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.environment import Environment, disposable_environment
from tests.conftest import NEWEST
from tests.engine import asking, server_lanes
from tests.engine.asking import image
from tests.engine.request_kinds import ANSWERED
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

# Relays on the way, too: a router in front of two tokenizer workers, and a data-parallel controller.
TOPOLOGY = {"0.5.18": ("--tokenizer-worker-num", "2"), NEWEST: ("--dp", "2")}


def uninstall(environment: Environment) -> None:
    """Delete what `pip uninstall` deletes."""
    for pattern in ("mmlane", "mmlane_patches", "mmlane.*", "sglang_mmlane-*.dist-info"):
        for path in environment.site_packages.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def upgrade(environment: Environment) -> None:
    """Put another version in its place, of which nothing can be imported: who reads it after all, fails."""
    for package in ("mmlane", "mmlane_patches"):
        for file in (environment.site_packages / package).rglob("*.py"):
            file.write_text('__version__ = "99"\nraise RuntimeError("read after the engine had started")\n')
        for compiled in (environment.site_packages / package).rglob("__pycache__"):
            shutil.rmtree(compiled)


CHANGES = [uninstall, pytest.param(upgrade, marks=pytest.mark.matrix)]
MODES = ["lane", pytest.param("backport", marks=pytest.mark.matrix)]


def answers(server: WatchedServer) -> list[list[list[int]]]:
    """The tokens of every kind of request; the first that a server is asked has an image."""
    replies = [ask(server) for ask in ANSWERED.values()]
    assert {reply.status for reply in replies} == {200}, [reply.body for reply in replies]
    return [asking.tokens(reply) for reply in replies]


def streamed(server: WatchedServer) -> str:
    *_, last = server.stream([image(8)], asking.TEXT)
    text: str = last["text"]
    return text


def started(release: str, environment: Environment, **environ: str) -> WatchedServer:
    arguments = TOPOLOGY.get(release, ())
    tp = 1 if "--dp" in arguments else 2
    return WatchedServer(release, environment=environment, args=arguments, env=environ, tp=tp)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.releases("0.5.12.post1", "0.5.18", "newest")
def test_under_a_running_engine(
    release: str,
    change: Callable[[Environment], None],
    mode: str,
    plugin_wheel: Path,
    tmp_path: Path,
    transcripts: Transcripts,
) -> None:
    unpatched = transcripts.of(release, plain)
    one = unpatched["pictures"]["4"]["tokens"]
    environment = disposable_environment(release, plugin_wheel, tmp_path / "overlay")

    def as_ever(server: WatchedServer) -> None:
        assert answers(server) == [answer["tokens"] for answer in unpatched["answers"].values()]
        assert [streamed(server)] == unpatched["pictures"]["8"]["texts"]
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        assert asking.two_images_n2(server).status == 200

    with started(release, environment, MMLANE=mode) as server:
        change(environment)  # before the first request: what that makes a process import is imported after this
        as_ever(server)
        if mode == "lane":
            server_lanes.open_lanes(server, 2 if "--tokenizer-worker-num" in TOPOLOGY.get(release, ()) else 1)
        before = server_lanes.lanes(server)
        with ThreadPoolExecutor(4) as pool:
            load = [pool.submit(server.generate, [image(seed)], asking.TEXT, n=2) for seed in range(16)]
            uninstall(environment)  # the other version, too
            assert {reply.result().status for reply in load} == {200}
        as_ever(server)
        after = server_lanes.lanes(server)
        assert [stats.fallbacks for stats in after] == [stats.fallbacks for stats in before]
        assert all(late.puts > early.puts for late, early in zip(after, before, strict=True))
        server_lanes.wait_for_baseline(server)
        assert server_lanes.features(server) == []
        assert re.findall(r"mmlane: .*(?:skipped|could not).*", server.log()) == []
