"""The engine releases the devkit knows, and how to compare them."""

from __future__ import annotations

import re

VERSIONS = (
    "0.5.9", "0.5.10", "0.5.10.post1", "0.5.11", "0.5.12", "0.5.12.post1", "0.5.13", "0.5.13.post1",
    "0.5.14", "0.5.15", "0.5.15.post1", "0.5.16", "0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21",
    "0.5.22", "0.5.23",
)  # fmt: skip


def release(version: str) -> tuple[int, ...]:
    """The three numbers; a post-release or release candidate needs of the devkit what its release does."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"not an engine version: {version!r}")
    return tuple(int(part) for part in match.groups())
