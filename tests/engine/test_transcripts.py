"""Each scenario on each chosen release: its transcript holds for the wheel, the devkit and what is done now.

With `--transcripts anew` it is made again, and this fails until git has what the release does now.
"""

from __future__ import annotations

import pytest

from tests.engine.transcripts import Scenario, Transcripts
from tests.engine.unpatched import every_scenario

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("scenario", every_scenario(), ids=lambda scenario: scenario.name)
def test_a_transcript(version: str, scenario: Scenario, transcripts: Transcripts) -> None:
    if not scenario.is_for(version):
        pytest.skip("no scenario for this release")
    transcripts.of(version, scenario)
    change = transcripts.change(version, scenario)
    assert change is None, f"{scenario.name} on {version}: {change}; if that is right, commit the transcript"
