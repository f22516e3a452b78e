"""What is measured: sizes, readers, fan-out, items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.sizes import GIB, JUDGED, KIB, MIB, size

SIZES = (64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
READERS = (1, 2, 4, 8)
QUICK_SIZES = (64 * KIB, 16 * MIB, 256 * MIB)
QUICK_READERS = (1, 2, 8)
FAN_OUT = 8  # samples of one request, the engine's n
ITEMS = 32  # images in one request
ONE_WAY = 64 * KIB


@dataclass(frozen=True, order=True)
class Case:
    """One kind of message. `nbytes` is the payload of one put, over all its `items`."""

    readers: int
    nbytes: int
    n: int = 1
    items: int = 1

    def __str__(self) -> str:
        parts = [size(self.nbytes), f"{self.readers} reader{'s' * (self.readers > 1)}"]
        if self.n > 1:
            parts.append(f"n = {self.n}")
        if self.items > 1:
            parts.append(f"{self.items} tensors")
        return ", ".join(parts)


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
