"""Every transcript of a release holds for its wheel, this devkit, and what its scenario does now."""

from __future__ import annotations

import pytest
from packaging.version import Version

from tests.engine.transcripts import Scenario, Transcripts
from tests.engine.unpatched.cuda_ipc import cuda_ipc
from tests.engine.unpatched.dp_attention import dp_attention
from tests.engine.unpatched.embeddings import embeddings
from tests.engine.unpatched.killed import killed_in_a_burst
from tests.engine.unpatched.plain import plain
from tests.engine.unpatched.refilling import refilled
from tests.engine.unpatched.sessions import session
from tests.engine.unpatched.small_memory import small_memory
from tests.engine.unpatched.stages import stages

pytestmark = pytest.mark.engine

SCENARIOS = (
    plain, killed_in_a_burst, small_memory, session, embeddings, stages, refilled, dp_attention, cuda_ipc
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_transcript(version: str, scenario: Scenario, transcripts: Transcripts) -> None:
    if not scenario.on(Version(version)):
        pytest.skip("no scenario for this release")
    transcripts.of(version, scenario)
