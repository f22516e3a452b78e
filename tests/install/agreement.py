"""Whether the doctor and the start of an engine say the same of one environment."""

from __future__ import annotations

import json
from typing import Any

from tests.install.environments import Way

# The plan is made when a process begins to import the engine, before the engine finds out what it lacks here.
BEGIN = """
import sys
try:
    import sglang
except ImportError as error:
    assert not error.name.startswith("sglang"), error
"""
TELL = """
import json, sys
entry = sys.modules.get("mmlane.entry")
session = entry and entry.session
print(json.dumps(session and {"by": session.trigger, **session.report().as_dict()}))
"""


def doctor(way: Way, *, code: int, **environ: str) -> dict[str, Any]:
    """What the doctor says of the environment, and that it exits with this code."""
    done = way.run("-m", "mmlane", "doctor", "--json", **environ)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def start(way: Way, *words: str, script: str = BEGIN, **environ: str) -> dict[str, Any] | None:
    """What mmlane has planned or done in a process that imports the engine; None without mmlane."""
    done = way.run("-c", script + TELL, *words, **environ)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def about_the_hook(found: dict[str, Any]) -> list[str]:
    """The doctor's problems with the startup hook."""
    return [line for line in found["problems"] if "startup hook" in line or "did not run" in line]


def states(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What becomes of each patch, and why."""
    return {patch["id"]: (patch["state"], patch["reason"]) for patch in found["patches"]}


def agree(doctor: dict[str, Any], start: dict[str, Any] | None) -> None:
    """The hook runs in the engine if the doctor has no problem with it; then each patch has the same state."""
    assert (start is not None) == (about_the_hook(doctor) == [])
    if start is not None:
        assert start["by"] == "startup hook"
        assert states(start) == states(doctor) != {}
        assert start["engine"] == doctor["engine"]["version"]
        assert start["untested"] == doctor["engine"]["untested"]
