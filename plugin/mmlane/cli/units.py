"""Numbers as a person reads them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes as a person reads them: 64 MiB, 1.5 GiB."""
    unit, value = "B", float(count)
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        unit, value = larger, value / 1024
    digits = f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"
    return f"{digits} {unit}"
