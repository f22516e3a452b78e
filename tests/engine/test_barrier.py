"""The barrier races, made certain by holding one rank while it unpickles, and ranks with a lane, which need no
barrier; see receive_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.engine.faults import ISOLATED
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.dp_attention import dp_attention, receive

pytestmark = pytest.mark.engine

ALL_OK = dict.fromkeys("0123", "ok")


@pytest.fixture(scope="session")
def patched(version: str, plugin_wheel: Path) -> dict[str, dict[str, Any]]:
    """Of all scenarios that there are on a release, in one process: most of its time is the engine's import."""
    waiting = ("attn", "tp", "tp-without-agreement") if Version(version) < ISOLATED else ()
    return receive(version, plugin_wheel, *waiting, "lane-attn", "lane-tp")


def test_unpatched_dp_attention(version: str, transcripts: Transcripts) -> None:
    """Below 0.5.15 the engine has no barrier on the attention groups: a slow rank finds the segment gone."""
    if not dp_attention.is_for(version):
        pytest.skip("0.5.9 unwraps before it broadcasts; from 0.5.15 the engine waits on these groups")
    assert transcripts.of(version, dp_attention) == {"held rank": "FileNotFoundError"}


def test_no_rank_takes_before_all_have_opened(version: str, patched: dict[str, dict[str, Any]]) -> None:
    """Our patch does the waiting, in the engine's place or where it has none: without it, the race is there."""
    if Version(version) >= ISOLATED:
        pytest.skip("from 0.5.19 mmlane leaves receiving alone")
    assert patched["attn"] == patched["tp"] == ALL_OK
    assert patched["tp-without-agreement"]["3"] == "RefusedInputs"


def test_ranks_with_a_lane(version: str, patched: dict[str, dict[str, Any]]) -> None:
    """Each of four ranks comes to the same result alone, and waits only where a segment is in the message."""
    isolated = Version(version) >= ISOLATED
    agreeing = ["barrier", "all_reduce"] if isolated else ["all_reduce"]
    lost = "MMInputsProcessError" if isolated else "RefusedInputs"

    def on_all_ranks(*waits: str, **requests: str) -> dict[str, Any]:
        return {rank: {**requests, "waits": list(waits)} for rank in ALL_OK}

    expected = {
        "opening": {"ranks": on_all_ranks(*agreeing, opening="ok"), "is_open": True},
        "by_lane": {"ranks": on_all_ranks(whole="ok"), "puts": 4, "tickets": 0},
        "mixed": {"ranks": on_all_ranks(*agreeing, lane="ok", segment="ok"), "puts": 4, "tickets": 0},
        # What else the lost request had is released; the ticket that was changed is not.
        "tampered": {"ranks": on_all_ranks(tampered=lost, whole="ok"), "puts": 8, "tickets": 1},
        "overflow": {"ranks": on_all_ranks(overflow="ok"), "puts": 3, "tickets": 1},
    }
    assert patched["lane-attn"] == patched["lane-tp"] == expected
