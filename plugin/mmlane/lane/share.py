"""One copy for several puts of one tensor, for as long as the caller says so."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from mmlane.lane.ledger import Extent


class Held:
    """What a lane knows of a share. Guarded by the lane's lock.

    uses: puts that are left. content: dtype and shape of what was put. extent: where its copy is; None before the
    first put, and once the share has ended.
    """

    __slots__ = ("content", "extent", "lane", "uses")

    def __init__(self, lane: object, uses: int) -> None:
        self.lane = lane
        self.uses = uses
        self.content: tuple[torch.dtype, torch.Size] | None = None
        self.extent: Extent | None = None


class Share:
    """Stands for one tensor that will be put a number of times; made by `Lane.share`, a context manager.

    The first `Lane.put(tensor, share=share)` copies, the others issue tickets on that copy: all of them carry the
    bytes that the tensor had at the first put. The copy is held until the uses are spent or the share is closed
    or dropped, whatever becomes of the tickets. A put that is refused, or raises what interrupted it, spends a use
    as well; a put beyond the uses, or with a closed share, copies.
    """

    closed = True  # until it is made

    def __init__(self, held: Held, end: Callable[[Held], None]) -> None:
        self.held = held
        self._end = end
        self.closed = False

    @property
    def is_spent(self) -> bool:
        """Whether all uses are spent, so that nothing is held any more."""
        return self.held.uses < 1

    def close(self) -> None:
        """Hold the copy no longer: it is free with its last ticket. Can be called wherever Python runs."""
        if not self.closed:
            self._end(self.held)  # only noted, the lane's next drain does it: twice, after an interrupt, is well
            self.closed = True

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.close()
