"""Four ranks of one attention group, of which one is held while it unpickles; see receive_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.version import Version

from tests.engine import forks
from tests.engine.faults import DEFERRED
from tests.engine.transcripts import HERE, scenario

SCRIPT = HERE / "receive_ranks.py"


def receive(version: str, plugin: Path | None, *scenarios: str) -> dict[str, dict[str, Any]]:
    """What each of four ranks got in each scenario: "ok", or the error. With a lane, for each case."""
    found, _ = forks.answered(forks.start(version, plugin, SCRIPT, *scenarios))
    heard: dict[str, dict[str, Any]] = found
    return heard


# 0.5.9 unwraps before it broadcasts; from 0.5.15 the engine waits on these groups.
@scenario(SCRIPT.name, on=lambda version: DEFERRED <= version < Version("0.5.15"))
def dp_attention(version: str) -> Any:
    """What the held rank got. Which of the others notices its end is chance."""
    return {"held rank": receive(version, None, "attn")["attn"]["3"].partition(":")[0]}
