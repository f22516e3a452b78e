"""How to compare engine releases."""

from __future__ import annotations

import re


def release(version: str) -> tuple[int, ...]:
    """The three numbers; a post-release or release candidate needs of the devkit what its release does."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"not an engine version: {version!r}")
    return tuple(int(part) for part in match.groups())
