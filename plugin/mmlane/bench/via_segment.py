"""A segment of `/dev/shm` for each tensor, as the back-ports have it, copied to a device from pageable memory.

`mode` is the device, such as `cuda:0`. No engine takes part, so that no agreement of the ranks is in the figures.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from torch import Tensor

from mmlane.bench import contract
from mmlane.bench.case import Case
from mmlane.bench.workers import Refusal
from mmlane.transport.segment import Segment


class Producer(contract.Producer):
    def open(self, case: Case) -> str:
        self._readers = case.readers
        self._made: list[Segment] = []
        return ""

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        try:
            made = [Segment.holding(tensor) for tensor in tensors]
        except OSError as error:
            raise Refusal(f"no segment could be made: {error}") from error
        self._made += made
        return [pickle.dumps([(one.name, tuple(one.shape), one.dtype) for one in made])] * self._readers

    def free(self) -> None:
        while self._made:
            self._made.pop().release()

    def close(self) -> None:
        self.free()


class Reader(contract.Reader):
    def open(self, address: str, rank: int, case: Case) -> None:
        self.device = self.mode
        self._held: list[Segment] = []

    def take(self, message: bytes) -> Sequence[Tensor]:
        opened = [Segment.opened(*one) for one in pickle.loads(message)]
        self._held += opened
        return [_mapped(one) for one in opened]

    def free(self) -> None:
        self._held.clear()

    def close(self) -> None:
        self.free()


def _mapped(segment: Segment) -> Tensor:
    """Its tensor. The segment stays, for the other readers. Raises RuntimeError."""
    tensor = segment.peek()
    if tensor is None:
        raise RuntimeError(f"segment {segment.name} could not be mapped: {segment.error}")
    return tensor
