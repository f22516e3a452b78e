"""The barrier races, made certain by holding one rank while it unpickles; see receive_ranks.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.environment import engine_environment

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("receive_ranks.py")
GONE = "FileNotFoundError"
OWN_WAY = Version("0.5.19")
ALL_OK = dict.fromkeys("0123", "ok")


def receive(version: str, plugin: Path | None, *words: str) -> dict[str, str]:
    """What each of four ranks got: "ok", or the error."""
    python = engine_environment(version, plugin=plugin).python
    result = subprocess.run(
        [str(python), str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_dp_attention(version: str, plugin_wheel: Path) -> None:
    """Below 0.5.15 the engine has no barrier on the attention groups: a slow rank finds the segment gone."""
    if Version(version) >= OWN_WAY:
        pytest.skip("from 0.5.19 mmlane leaves receiving alone")
    if Version("0.5.10") <= Version(version) < Version("0.5.15"):  # 0.5.9 unwraps before it broadcasts
        assert GONE in receive(version, None, "--groups", "attn")["3"]
    assert receive(version, plugin_wheel, "--groups", "attn") == ALL_OK


def test_tensor_parallel(version: str, plugin_wheel: Path) -> None:
    """Our patch does the waiting, in the engine's place or where it has none: without it, the race is there."""
    if Version(version) >= OWN_WAY:
        pytest.skip("from 0.5.19 mmlane leaves receiving alone")
    assert receive(version, plugin_wheel, "--groups", "tp", "--without-agreement")["3"] == "LostFeatures"
    assert receive(version, plugin_wheel, "--groups", "tp") == ALL_OK
