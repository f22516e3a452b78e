"""The engine's own transport with mmlane in it: `mode` is `backport` or `lane`, as in `MMLANE`.

The functions called are the engine's, as in `via_engine`; mmlane has replaced some of them when they were
imported (worker.py). What stands in for the engine's tokenizer and schedulers is given the two sides that mmlane
gives to them. As the engine's processes do, they open their lane once, with the first large feature, which goes by
a segment itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mmlane.bench import via_engine
from mmlane.bench.case import Case
from mmlane.bench.workers import Refusal
from mmlane.engine.requests import items
from mmlane.transport.base import Scheduler, Tokenizer
from mmlane.transport.chain import Chain
from mmlane.transport.pointer import is_pointer, slot
from mmlane.transport.samples import Samples
from mmlane.transport.scheduler_side import SchedulerSide
from mmlane.transport.tokenizer_side import SIDE, Sending, TokenizerSide, sending

_GROUP = "bench"


class Producer(via_engine.Producer):
    """A tokenizer's part."""

    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        self._manager = SimpleNamespace()
        self._around: Sending | None = None
        self._puts = 0
        self._by: set[str] = set()  # the kinds of what the last request carried
        self._was_open = False

    def open(self, case: Case) -> str:
        self._n = case.n
        if self.mode == "lane" and not hasattr(self._manager, SIDE):
            here = Tokenizer({_GROUP: case.readers}, engine_class=slot.chain.here.engine_class)
            setattr(self._manager, SIDE, TokenizerSide(here))
        return super().open(case)

    def is_settled(self) -> bool:
        return self.mode != "lane" or self._by == {"ticket"}

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        with self._samples():
            messages = super().put(tensors)
        self._was_open = self._was_open or self.is_settled()
        if self._was_open and not self.is_settled():
            raise Refusal(f"a feature did not go by the lane, but by: {', '.join(sorted(self._by))}")
        return messages

    @contextmanager
    def _samples(self) -> Iterator[None]:
        """The n puts of the same tensors are samples of one request, as in the engine."""
        if self._n == 1:
            yield
            return
        if self._around is None:
            self._around = Sending(slot.chain, Samples(self._n))
        token = slot.scope.set(self._around)
        try:
            yield
        finally:
            slot.scope.reset(token)
        self._puts += 1
        if self._puts % self._n == 0:
            assert self._around.shared is not None
            self._around.shared.close()
            self._around.end()
            self._around = None

    def _send(self, request: Any) -> None:
        with sending(self._manager, request):
            super()._send(request)
            self._by = {_kind(item.feature) for item in items(request)}


class Reader(via_engine.Reader):
    """A scheduler's part."""

    def open(self, address: str, rank: int, case: Case) -> None:
        super().open(address, rank, case)
        if self.mode == "lane" and slot.scheduler is None:
            chain = Chain(Scheduler(_GROUP, rank, engine_class=slot.chain.here.engine_class))
            slot.scheduler, slot.chain = SchedulerSide(chain), chain


def _kind(feature: Any) -> str:
    """How a feature travels; a segment's kind is empty."""
    return (feature.payload.kind or "segment") if is_pointer(feature) else "inline"
