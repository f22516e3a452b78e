"""What is measured: sizes, readers, fan-out, items."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness.sizes import GIB, JUDGED, KIB, MIB
from mmlane.bench.case import Case

SIZES = (64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
READERS = (1, 2, 4, 8)
QUICK_SIZES = (64 * KIB, 16 * MIB, 256 * MIB)
QUICK_READERS = (1, 2, 8)
FAN_OUT = 8  # samples of one request, the engine's n
ITEMS = 32  # images in one request
ONE_WAY = 64 * KIB


def plan(sizes: Sequence[int], readers: Sequence[int], *, quick: bool) -> list[Case]:
    """The cases to measure: sweeps through the middle, not the whole product."""
    few = [r for r in readers if r <= 2]
    many = [r for r in readers if r > 2]
    large = [s for s in sizes if 64 * MIB <= s <= JUDGED]
    cases = {Case(r, s) for s in sizes for r in few if s <= JUDGED or r == min(readers)}
    cases |= {Case(r, s) for s in large for r in many}
    fanned = [s for s in sizes if 16 * MIB <= s <= JUDGED]
    cases |= {Case(min(readers), s, n=FAN_OUT) for s in fanned}
    cases |= {Case(min(readers), s, items=ITEMS) for s in large}
    if not quick:
        # What is expensive, with two readers at one size only.
        cases |= {
            Case(r, s, **more) for r in few for s in large[:1] for more in ({"n": FAN_OUT}, {"items": ITEMS})
        }
    return sorted(cases)
