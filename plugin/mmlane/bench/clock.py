"""One clock for all processes: CLOCK_MONOTONIC is the machine's, not the process's."""

from __future__ import annotations

from time import monotonic_ns as stamp

__all__ = ["seconds", "stamp"]


def seconds(nanoseconds: int) -> float:
    return nanoseconds / 1e9
