"""`mmlane serve` starts the real engine where no .pth file brings mmlane: without `site`, and from --target."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from devkit.environment import base_environment, engine_environment
from devkit.installer import pip, site_packages
from tests.engine import asking, server_lanes
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = [pytest.mark.engine, pytest.mark.matrix]


class Served(WatchedServer):
    """Started by `python [-S] -m mmlane serve`, with packages that are found by PYTHONPATH alone."""

    def __init__(self, release: str, packages: list[Path], *, site: bool, plugin: Path | None = None) -> None:
        environment = None if plugin is not None else engine_environment(release)
        super().__init__(release, plugin=plugin, environment=environment, env={"MMLANE_LOG": "debug"})
        self._packages = packages
        self._site = site

    def _command(self, port: int) -> list[str]:
        python, _, _, *arguments = super()._command(port)
        return [python, *([] if self._site else ["-S"]), "-m", "mmlane", "serve", *arguments]

    def _environ(self) -> dict[str, str]:
        # No probes: they come with `site`, before mmlane, which leaves alone what others have replaced.
        return {**super()._environ(), "PYTHONPATH": os.pathsep.join(map(str, self._packages))}

    def verify(self) -> None:
        """Nothing was noted."""


def has_mmlane_everywhere(server: WatchedServer, transcripts: Transcripts) -> None:
    """An image is answered as without mmlane, and by lane; each process has started mmlane itself."""
    unpatched = transcripts.of(server.version, plain)
    server_lanes.open_lanes(server)
    before = server_lanes.lane(server)
    picture = unpatched["pictures"]["4"]
    assert asking.tokens(server.generate([asking.image(4)], asking.TEXT)) == picture["tokens"]
    after = server_lanes.lane(server)
    assert (after.puts - before.puts, after.fallbacks) == (1, before.fallbacks)
    lines = re.findall(r"mmlane: \[(\d+)\] (\w+): sglang \S+ mode lane, by (.+?); applied (.+?);", server.log())
    assert sorted(role for _, role, _, _ in lines) == ["detokenizer", "main", "scheduler", "scheduler"]
    assert {trigger for _, _, trigger, _ in lines} == {"startup hook"}
    assert all("lane" in applied for _, role, _, applied in lines if role == "scheduler")


@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18")
def test_without_site(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    layers = [engine_environment(release, plugin=plugin_wheel).root, engine_environment(release).root]
    packages = [site_packages(root) for root in (*layers, base_environment())]
    with Served(release, packages, site=False, plugin=plugin_wheel) as server:
        has_mmlane_everywhere(server, transcripts)


@pytest.mark.releases("newest", "0.5.9")
def test_from_target(release: str, plugin_wheel: Path, transcripts: Transcripts, tmp_path: Path) -> None:
    pip(base_environment(), "install", "--no-deps", "--target", tmp_path, plugin_wheel)
    with Served(release, [tmp_path], site=True) as server:
        has_mmlane_everywhere(server, transcripts)
