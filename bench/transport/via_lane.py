"""mmlane's lane; `mode` is how readers take: `view`, `cow` or `clone`. `n` tickets of a tensor are on one copy.

One setting is not the default: memory is kept over longer pauses than a minute, since it is the other ways' turns
that make them.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TypeVar, cast

from torch import Tensor

from bench.harness.workers import Refusal
from bench.transport import contract
from bench.transport.cases import Case
from mmlane import lane

T = TypeVar("T")

_GROUP = "bench"
_PATIENCE_S = 30.0
_IDLE_S = 3600.0


class Producer(contract.Producer):
    def open(self, case: Case) -> str:
        self._readers, self._n = case.readers, case.n
        self._puts = 0
        self._copies: list[lane.Reservation] = []
        self._lane = lane.Lane(readers={_GROUP: case.readers}, idle=_IDLE_S)
        return bytes(self._lane.invitation).hex()

    def ready(self) -> None:
        if not self._lane.wait_open(timeout=_PATIENCE_S):
            raise TimeoutError(f"the lane did not open for {self._readers} readers in {_PATIENCE_S} s")

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        if self._n == 1:
            tickets = [_accepted(self._lane.put(tensor)) for tensor in tensors]
        else:
            if self._puts % self._n == 0:  # the first of n with the same tensors
                self._copies = [_accepted(self._lane.copy(tensor)) for tensor in tensors]
            self._puts += 1
            tickets = [_accepted(copy.publish()) for copy in self._copies]
            if self._puts % self._n == 0:
                self._copies = []
        return [pickle.dumps(tickets)] * self._readers

    def free(self) -> None:
        self._lane.drain()

    def close(self) -> None:
        self._lane.close()
        del self._lane


def _accepted(answer: T | lane.Refused) -> T:
    if isinstance(answer, lane.Refused):
        raise Refusal(f"refused, {answer.cause}: {answer.detail}")
    return answer


class Reader(contract.Reader):
    def open(self, address: str, rank: int, case: Case) -> None:
        self._reader = lane.Reader(_GROUP, rank)
        self._reader.join(lane.Invitation.parse(bytes.fromhex(address)), timeout=_PATIENCE_S)

    def take(self, message: bytes) -> Sequence[Tensor]:
        mode = cast(lane.Mode, self.mode)
        return [self._reader.take(ticket, mode) for ticket in pickle.loads(message)]

    def close(self) -> None:
        self._reader.close()
        del self._reader
