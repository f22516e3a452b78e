"""The transcripts that `make test` reads hold for the wheels, the devkit and the scenarios that there are."""

from __future__ import annotations

import pytest

from tests.conftest import USUAL
from tests.engine.transcripts import Scenario, Transcripts
from tests.engine.unpatched import every_scenario, refilling


@pytest.mark.parametrize("scenario", every_scenario(), ids=lambda scenario: scenario.name)
def test_transcripts_hold(scenario: Scenario) -> None:
    """Else the engine tests would say so, much later."""
    releases = {*USUAL, refilling.RELEASES[0]} if scenario is refilling.refilled else USUAL
    for release in releases:
        if scenario.is_for(release):
            Transcripts().of(release, scenario)
