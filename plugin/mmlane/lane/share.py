"""One copy for several puts of one tensor, for as long as the caller says so."""

from __future__ import annotations

import torch

from mmlane.lane.bookkeeping import Hold


class Shared(Hold):
    """What a lane knows of a share, and the hold on its copy. Guarded by the lane's lock.

    uses: puts that are left. content: dtype and shape of what was put. extent: where its copy is; None before the
    first put, and once the share has ended.
    """

    __slots__ = ("content", "lane", "uses")

    def __init__(self, lane: object, uses: int) -> None:
        super().__init__()
        self.lane = lane
        self.uses = uses
        self.content: tuple[torch.dtype, torch.Size] | None = None


class Share:
    """Stands for one tensor that will be put a number of times; made by `Lane.share`, a context manager.

    The first `Lane.put(tensor, share=share)` copies, the others issue tickets on that copy: all of them carry the
    bytes that the tensor had at the first put. The lane keeps the copy until the uses are spent or the share is
    closed or dropped, whatever becomes of the tickets. A put that is refused, or raises what interrupted it,
    spends a use as well; a put beyond the uses, or with a closed share, copies.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared: Shared | None = shared  # lets go of the copy when nobody has it any more

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.shared is None

    @property
    def is_spent(self) -> bool:
        """Whether all uses are spent, or given up, so that nothing is kept any more."""
        return self.shared is None or self.shared.uses < 1

    def close(self) -> None:
        """Keep the copy no longer: it is free with its last ticket. Can be called wherever Python runs."""
        self.shared = None

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
