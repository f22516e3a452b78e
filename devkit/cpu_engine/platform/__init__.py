"""An out-of-tree platform that runs the engine's pure-torch paths on CPU cores."""

from __future__ import annotations


def activate() -> str:
    """The entry point: where the engine finds the platform's class."""
    return f"{__name__}.platform:CpuPlatform"
