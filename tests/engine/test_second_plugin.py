"""A second plugin that wants the engine's pointer for itself: mmlane says so, and images are answered.

It is `probes/probe_second_plugin.py`: it takes its place before mmlane comes, or after it by the engine's hooks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

from tests.engine import asking, server_lanes
from tests.engine.field_reports import on
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

TARGET = r"sglang\.srt\.managers\.mm_utils\.ShmPointerMMData"
THEIRS = r"probe_second_plugin\.Pointer"
OWN_POINTER = Version("0.5.21")  # from here on the engine's is good enough to carry segments


def answers_by_segment(server: WatchedServer, release: str, transcripts: Transcripts) -> None:
    """As without mmlane, by the other plugin's pointers; nothing is left of them."""
    unpatched = transcripts.of(release, plain)["answers"]
    before = asking.segments(server)
    for name in ("one image", "two images", "larger image"):
        reply = asking.ANSWERED[name](server)
        assert reply.status == 200, (name, reply.body)
        assert asking.tokens(reply) == unpatched[name]["tokens"], name
    assert list(server.notes.glob("*.theirs"))
    assert server_lanes.lanes(server) == []
    asking.wait_for(
        lambda: asking.segments(server).keys() <= before.keys(),
        lambda: f"{asking.segments(server)} to go but {before}",
    )


@on("0.5.9")
def test_one_that_came_before(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """The patches that need the pointer are left out, in all processes."""
    with WatchedServer(release, plugin=plugin_wheel, probes=["second_plugin"]) as server:
        answers_by_segment(server, release, transcripts)
        lines = re.findall(rf"mmlane: +skipped (\S+): {TARGET} is already replaced by {THEIRS};", server.log())
        skipped = {patch for patches in lines for patch in patches.split(",")}
        assert skipped >= ({"shm_pointer", "lane"} if Version(release) < OWN_POINTER else {"lane"})


@on("newest", since="0.5.11")  # older engines have no hooks
def test_one_that_comes_by_hook(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    server = WatchedServer(release, plugin=plugin_wheel, probes=["second_plugin"])
    metadata = server.notes / "installed" / "second_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: second_plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nsecond = probe_second_plugin:register\n")
    with server:
        answers_by_segment(server, release, transcripts)
        assert re.search(
            rf"mmlane: {TARGET}, patched by \w+, has since been replaced by {THEIRS}; so", server.log()
        )
