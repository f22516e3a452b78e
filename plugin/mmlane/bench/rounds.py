"""What is measured in a round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """What one message to all readers came to; seconds, and bytes where it was asked for."""

    cost_s: float
    memcpy_s: float
    put_s: float
    take_s: float
    first_read_extra_s: float
    free_reader_s: float
    free_producer_s: float
    memory_bytes: int | None
