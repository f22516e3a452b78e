"""Numbers of bytes, in words and out of them, as the plugin's own comparison has them."""

from __future__ import annotations

from mmlane.bench.sizes import GIB, KIB, MIB, parse_size, size

__all__ = ["GIB", "JUDGED", "KIB", "MIB", "parse_size", "size"]

JUDGED = 256 * MIB  # the goals are set at this size
