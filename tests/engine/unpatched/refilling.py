"""`sglang.Engine` in a script that puts the next picture into one tensor; see refilled.py."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from tests.engine.digests import compare
from tests.engine.faults import FANNED_OUT
from tests.engine.transcripts import HERE, scenario
from tests.engine.watching import WatchedServer

SCRIPT = HERE / "refilled.py"
RELEASES = ("0.5.16", "0.5.10", "0.5.12.post1", "newest")
SAMPLES = 4


@scenario("refilled.py", on=RELEASES)
def refilled(version: str) -> Any:
    """What each picture is answered with, by one sample, and by several where that does not end the engine."""
    engine = WatchedServer(version)
    samples = f"1,{SAMPLES}" if Version(version) >= FANNED_OUT else "1"
    answers: dict[str, list[Any]] = engine.run(SCRIPT, samples)["answers"]
    compare(engine.notes).verify(ranks=engine.tp, answered=len(answers))
    for answer in (answer for several in answers.values() for answer in several):
        answer["logprobs"] = [round(number, 4) for number in answer["logprobs"]]
    return answers
