"""The engine releases that benchmarks take by default: the newest one is that of the table."""

from __future__ import annotations

from mmlane.compat import matrix

NEWEST = str(matrix().newest)
