"""A tensor that its owner refills between requests: each answer is about what was in it then; see refilled.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.engine.digests import compare
from tests.engine.faults import FANNED_OUT
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.refilling import RELEASES, SAMPLES, SCRIPT, refilled
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    close: bool = answer["logprobs"] == pytest.approx(expected["logprobs"], rel=0, abs=1e-3)
    return close and answer["tokens"] == expected["tokens"]


@pytest.mark.releases(*RELEASES)
def test_a_tensor_that_is_refilled(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """One sample and several, pixels and embeddings, whichever way the next picture is written."""
    survives = Version(release) >= FANNED_OUT  # several samples, without the plugin
    expected = transcripts.of(release, refilled)
    engine = WatchedServer(release, plugin=plugin_wheel)
    found = engine.run(SCRIPT, f"1,{SAMPLES}")
    wrong = []
    for request, answers in found["answers"].items():
        several = f"n={SAMPLES}" in request
        right = expected[request if survives else request.replace(f"n={SAMPLES}", "n=1")]
        assert len(answers) == (SAMPLES if several else 1)
        if not all(same(answer, right[0]) for answer in answers):
            wrong.append(request)
    notes = compare(engine.notes)
    assert (wrong, notes.faults) == ([], [])
    notes.verify(ranks=engine.tp, answered=len(found["answers"]))
    # Else nothing was put to the test: no two pictures have the same answer, and all went by lane.
    of_one = [answers[0] for request, answers in expected.items() if "n=1" in request]
    assert not any(same(one, other) for i, one in enumerate(of_one) for other in of_one[:i])
    assert found["lane"]["fallbacks"].keys() <= {"not_open"}
    assert found["lane"]["puts"] >= len(found["answers"])
