"""torch.multiprocessing with the sharing strategy `file_system`, as a queue or pipe of it sends a tensor.

The source itself moves into shared memory at its first put; further puts of it, and what a second reader gets,
share that. Its segment goes when the last process lets go of it, so the producer's freeing is dropping the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch.multiprocessing
from torch import Tensor

from mmlane.bench import contract
from mmlane.bench.case import Case


class Producer(contract.Producer):
    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        _share_by(mode)

    def open(self, case: Case) -> str:
        self._readers = case.readers
        return ""

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        # Pickled for each reader: every pickle counts as one more that holds the segment.
        return [bytes(ForkingPickler.dumps(list(tensors))) for _ in range(self._readers)]

    def close(self) -> None:
        pass


class Reader(contract.Reader):
    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        _share_by(mode)

    def open(self, address: str, rank: int, case: Case) -> None:
        pass

    def take(self, message: bytes) -> Sequence[Tensor]:
        tensors: list[Tensor] = ForkingPickler.loads(message)
        return tensors

    def close(self) -> None:
        pass


def _share_by(strategy: str | None) -> None:
    setter: Callable[[str | None], None] = torch.multiprocessing.set_sharing_strategy
    setter(strategy)
