"""The lane on its own, without an engine. `n` tickets of a tensor are on one copy.

`mode` is how readers take: `view`, `cow` or `clone`, None for what they do by default; or it is a device, such as
`cuda:0`: then the lane's memory is pinned, and what is measured is the tensor's arrival there.

One setting is not the default: memory is kept over longer pauses than a minute, since it is the other ways' turns
that make them.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from typing import TypeVar, cast

from torch import Tensor

from mmlane import lane
from mmlane.bench import contract
from mmlane.bench.case import Case
from mmlane.bench.workers import Refusal

T = TypeVar("T")

_GROUP = "bench"
_PATIENCE_S = 30.0
_IDLE_S = 3600.0
_ROOM = 4 << 20  # of a lane, for what each tensor's extent has over its bytes


class Producer(contract.Producer):
    def open(self, case: Case) -> str:
        self._readers, self._n = case.readers, case.n
        self._puts = 0
        self._copies: list[lane.Reservation] = []
        pinned: dict[str, int] = {}
        if _is_device(self.mode):
            room = case.nbytes + case.items * _ROOM
            pinned = {"capacity": room, "pinned": room}
        self._lane = lane.Lane(readers={_GROUP: case.readers}, idle=_IDLE_S, **pinned)
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
        deadline = time.monotonic() + _PATIENCE_S
        while _is_device(self.mode) and self._lane.stats().tickets:  # released once the devices have read them
            if time.monotonic() > deadline:
                raise TimeoutError(f"tickets were not released in {_PATIENCE_S} s")
            os.sched_yield()
            self._lane.drain()

    def close(self) -> None:
        self._lane.close()
        del self._lane


def _is_device(mode: str | None) -> bool:
    return mode is not None and mode.startswith("cuda")


def _accepted(answer: T | lane.Refused) -> T:
    if isinstance(answer, lane.Refused):
        raise Refusal(f"refused, {answer.cause}: {answer.detail}")
    return answer


class Reader(contract.Reader):
    def open(self, address: str, rank: int, case: Case) -> None:
        self.device = self.mode if _is_device(self.mode) else None
        self._reader = lane.Reader(_GROUP, rank, device=self.device)
        invitation = lane.Invitation.parse(bytes.fromhex(address))
        self._reader.join(invitation, timeout=_PATIENCE_S)
        self._lane_name = invitation.name

    def take(self, message: bytes) -> Sequence[Tensor]:
        if self.device is not None:
            return self._take_pinned(message)
        mode = cast(lane.Mode, self.mode)
        return [self._reader.take(ticket, mode) for ticket in pickle.loads(message)]

    def _take_pinned(self, message: bytes) -> Sequence[Tensor]:
        if not self._reader.wait_pinned(self._lane_name, _PATIENCE_S):
            raise RuntimeError(f"the lane could not be registered as pinned memory, or not in {_PATIENCE_S} s")
        tensors = [self._reader.take(ticket) for ticket in pickle.loads(message)]
        if not all(tensor.is_pinned() for tensor in tensors):
            raise RuntimeError("a tensor lies outside of the lane's pinned memory")
        return tensors

    def close(self) -> None:
        self._reader.close()
        del self._reader
