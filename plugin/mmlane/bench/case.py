"""One kind of message that is measured."""

from __future__ import annotations

from dataclasses import dataclass

from mmlane.bench.sizes import size


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
