"""Two pipeline stages: the second gets its requests from the first, and answers must not notice the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import asking, server_lanes
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.stages import (
    RELEASES,
    answers,
    stages,
    two_stages,
    wait_for_no_new_segments,
)

pytestmark = pytest.mark.engine


@pytest.mark.releases(*RELEASES)
def test_two_stages(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    unpatched = transcripts.of(release, stages)
    assert unpatched["tensors cross twice"]
    with two_stages(release, plugin_wheel, "lane") as server:
        before = set(asking.segments(server))
        server_lanes.open_lanes(server)  # of the first stage: the other has no use for it
        assert server_lanes.lane(server).joined == {"dp0": [0, 1]}
        assert answers(server) == unpatched["answers"]
        one = asking.tokens(server.generate([asking.image(4)], asking.TEXT))
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        assert asking.two_images_n2(server).status == 200
        assert asking.bytes_between_ranks(server) < asking.TENSOR
        server_lanes.wait_for_baseline(server)
        wait_for_no_new_segments(server, before)


@pytest.mark.matrix
@pytest.mark.releases("0.5.12.post1", "newest")
def test_two_stages_without_the_lane(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    unpatched = transcripts.of(release, stages)
    with two_stages(release, plugin_wheel, "backport") as server:
        before = set(asking.segments(server))
        assert answers(server) == unpatched["answers"]
        one = asking.tokens(server.generate([asking.image(4)], asking.TEXT))
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        assert asking.two_images_n2(server).status == 200
        # What the first stage finds out is what the second is told.
        lost = asking.ask_and_lose_the_segment(server)
        assert lost.status == 500, lost.body
        assert asking.tokens(server.generate([asking.image(4)], asking.TEXT)) == one
        wait_for_no_new_segments(server, before)
