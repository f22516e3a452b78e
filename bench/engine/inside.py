"""Calls a benchmark's function in the environment of an engine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.harness.machine import CHECKOUT
from devkit.environment import engine_environment


def call_inside(release: str, wheel: Path, module: str, function: str, *arguments: object) -> Any:
    """What it returns there, by way of JSON, with the plugin installed."""
    code = f"import json; from {module} import {function}; print(json.dumps({function}(*{arguments!r})))"
    python = engine_environment(release, plugin=wheel).python
    command = [str(python), "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
