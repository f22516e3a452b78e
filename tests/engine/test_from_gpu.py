"""What the engine's processor moves from a GPU to the CPU lands in the lane; the GPU is a stand-in.

See `probes/probe_gpu_processor.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import asking, server_lanes
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine


@pytest.mark.releases("newest")
def test_features_are_copied_once(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """By the engine's own move; the requests are answered as ever, and nothing is left."""
    expected = transcripts.of(release, plain)["answers"]
    env = {"MMLANE_PINNED_MB": "0"}  # there is no CUDA to register it with
    with WatchedServer(release, plugin=plugin_wheel, probes=["gpu_processor"], env=env) as server:
        server_lanes.open_lanes(server)
        before = server_lanes.lane(server)
        for name, ask in asking.ANSWERED.items():
            assert asking.tokens(ask(server)) == expected[name]["tokens"], name
        one = asking.tokens(server.generate([asking.image(4)], asking.TEXT))
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        after = server_lanes.lane(server)
        assert (after.copied_bytes, after.fallbacks) == (before.copied_bytes, before.fallbacks)
        # Two images lie in one piece, where the release makes an item of each; samples share theirs.
        assert after.puts - before.puts >= 8 and after.shared_puts > before.shared_puts
        server_lanes.wait_for_baseline(server)


@pytest.mark.matrix
@pytest.mark.releases("0.5.9", "0.5.10", "0.5.12.post1", "0.5.16", "0.5.18", "0.5.20")
def test_features_are_copied_once_on_older_releases(
    release: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    test_features_are_copied_once(release, plugin_wheel, transcripts)
