"""A lane and its readers in one process: real memory and real sockets, and every step can be looked at."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mmlane.lane import Lane, LaneStats, Reader, Refused, Share
from tests.lane import oracle
from tests.lane.processes import DEADLINE, eventually

PAGE = 4096
SEGMENT = 64 << 10


@dataclass
class Together:
    """An open lane, the readers of its only group `tp`, and what is at hand of both."""

    lane: Lane
    readers: list[Reader] = field(default_factory=list)

    @property
    def reader(self) -> Reader:
        """The first one."""
        return self.readers[0]

    def put(self, tensor: torch.Tensor, *, share: Share | None = None) -> bytes:
        """A ticket; a refusal is a failure."""
        ticket = self.lane.put(tensor, share=share)
        assert isinstance(ticket, bytes), ticket
        return ticket

    def refused(self, tensor: Any, *, share: Share | None = None) -> Refused:
        """A refusal, which is counted and changes nothing else."""
        before = self.lane.stats()
        refused = self.lane.put(tensor, share=share)
        assert isinstance(refused, Refused)
        after = self.lane.stats()
        assert after.refused.get(refused.cause, 0) == before.refused.get(refused.cause, 0) + 1
        assert books(after) == books(before)
        return refused

    def books(self) -> dict[str, Any]:
        """What is out and held now."""
        return books(self.lane.stats())

    def nothing_is_out(self) -> bool:
        """Whether all tickets have ended, and no extent is held."""
        stats = self.lane.stats()
        return (stats.tickets, stats.extents, stats.taken) == (0, 0, 0)

    def wait_until_nothing_is_out(self) -> None:
        """Give-backs may wait for a device."""
        eventually(self.nothing_is_out, "all extents are back")


def books(stats: LaneStats) -> dict[str, Any]:
    """All that a request that fails must not change: it may change its own count, and memory committed."""
    return {
        "tickets": stats.tickets,
        "extents": stats.extents,
        "taken": stats.taken,
        "readers": stats.readers,
        "puts": stats.puts,
        "shared": stats.shared,
        "orphans": stats.orphans,
        "strays": stats.strays,
        "strangers": stats.strangers,
    }


@contextmanager
def together(
    readers: int = 1, *, linger: float = 30.0, device: str | None = None, **options: Any
) -> Iterator[Together]:
    """A lane, of 16 small segments by default. Nothing of it is left in this process when all is well."""
    before = oracle.lane_files(os.getpid())
    options = {"capacity": 16 * SEGMENT, "segment": SEGMENT, **options}
    pair = Together(Lane({"tp": readers}, **options))
    try:
        for _ in range(readers):
            pair.readers.append(Reader("tp", linger=linger, device=device))
            pair.readers[-1].join(pair.lane.address, DEADLINE)
        assert pair.lane.wait_open(DEADLINE)
        yield pair
        assert pair.lane.stats().strays == 0
    finally:
        for reader in pair.readers:
            reader.close()
        pair.lane.close()
    gc.collect()
    eventually(lambda: oracle.lane_files(os.getpid()) <= before, "the lane's memory is let go")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as its reader should see them."""
    resolved = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Of one element or none, a contiguous tensor may have any strides, which `view` minds.
    return resolved.as_strided((resolved.numel(),), (1,)).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte are the same (not values: a NaN is itself)."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(plain(left), plain(right))


def random(shape: Sequence[int], dtype: torch.dtype = torch.uint8, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, in any dtype."""
    count = torch.Size(shape).numel()
    raw = torch.randint(
        0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
