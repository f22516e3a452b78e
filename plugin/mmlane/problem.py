"""What is wrong, with what solves it: nothing is reported as a problem without a command or a setting."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A line. `what` leads up to `command`: one for a shell, or a setting, that solves or silences the problem."""

    what: str
    command: str

    def __str__(self) -> str:
        return f"{self.what} {self.command}"


def python(*words: str) -> str:
    """A command of this interpreter's, which may not be the first on PATH."""
    return shlex.join([sys.executable, *words])


def reinstall() -> str:
    """The command that installs mmlane anew in this environment."""
    return python("-m", "pip", "install", "--force-reinstall", "sglang-mmlane")
