"""What one round comes to: passed from a way's producer to the benchmark, which has no need of torch for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One message to all readers; seconds, and bytes where it was asked for. See bench.transport."""

    cost_s: float
    memcpy_s: float
    put_s: float
    take_s: float
    first_read_extra_s: float
    free_reader_s: float
    free_producer_s: float
    memory_bytes: int | None
