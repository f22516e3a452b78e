"""Puts and shares in any order beside a model: nothing is ever read but what was put, nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mmlane.lane import Refused, Share
from tests.effort import examples
from tests.lane.harness.payloads import random, same
from tests.lane.harness.together import PAGE, held, together


@dataclass(eq=False)
class Copy:
    """A copy in the lane as it has to be."""

    content: Tensor
    tickets: int = 0
    shared: bool = False


@dataclass(eq=False)
class Sharing:
    """A share as it has to be. first: its first copy, held or not any more."""

    share: Share
    tensor: Tensor
    uses: int
    copy: Copy | None = None


class Shares(RuleBasedStateMachine):
    """Tensors that are written to, put and shared in any order, beside copies of what tickets have to read."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = together(capacity=32 * PAGE, segment=2 * PAGE)
        self.pair = self.scope.__enter__()
        self.tensors: list[Tensor] = []
        self.shares: list[Sharing] = []
        self.out: list[tuple[bytes, Copy]] = []
        self.taken: list[tuple[Tensor, Copy]] = []
        self.puts = self.shared = self.refused = 0

    def one(self, data: st.DataObject, many: list[Any]) -> Any:
        return many[data.draw(st.sampled_from(range(len(many))), "which")]

    # --- tensors and shares --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tensors) < 4)
    @rule(pages=st.integers(0, 3), seed=st.integers(0, 9))
    def make(self, pages: int, seed: int) -> None:
        self.tensors.append(random((pages * PAGE + 8,), seed=seed))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), how=st.integers(0, 2), by=st.integers(1, 255))
    def write(self, data: st.DataObject, how: int, by: int) -> None:
        tensor = self.one(data, self.tensors)
        [lambda: tensor.add_(by), lambda: tensor.data.add_(by), lambda: tensor.numpy().__iadd__(by)][how]()

    @precondition(lambda self: self.tensors and len(self.shares) < 5)
    @rule(data=st.data(), uses=st.integers(1, 4))
    def share(self, data: st.DataObject, uses: int) -> None:
        self.shares.append(Sharing(self.pair.lane.share(uses), self.one(data, self.tensors), uses))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop_a_tensor(self, data: st.DataObject) -> None:
        tensor = self.one(data, self.tensors)
        self.tensors = [other for other in self.tensors if other is not tensor]

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sharing = self.one(data, self.shares)
        sharing.share.close()
        self.end(sharing)

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def drop_a_share(self, data: st.DataObject) -> None:
        sharing = self.one(data, self.shares)
        self.shares.remove(sharing)
        self.end(sharing)
        del sharing.share

    def end(self, sharing: Sharing) -> None:
        sharing.uses = 0
        if sharing.copy is not None:
            sharing.copy.shared = False
            sharing.copy = None

    # --- puts ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        self.copied(self.one(data, self.tensors), None)

    @precondition(lambda self: self.shares)
    @rule(data=st.data(), times=st.integers(1, 5))
    def put_with_a_share(self, data: st.DataObject, times: int) -> None:
        sharing = self.one(data, self.shares)
        for _ in range(times):
            if sharing.copy is None:
                copy = self.copied(sharing.tensor, sharing.share)
                if copy is not None and sharing.uses > 1:
                    sharing.copy, copy.shared = copy, True
            else:
                ticket = self.pair.put(sharing.tensor, share=sharing.share)
                self.issued(ticket, sharing.copy)
                self.shared += 1
            sharing.uses -= 1
            if sharing.uses < 1:
                self.end(sharing)

    @precondition(lambda self: any(sharing.copy for sharing in self.shares))
    @rule(data=st.data())
    def put_another_with_a_share(self, data: st.DataObject) -> None:
        sharing = self.one(data, [sharing for sharing in self.shares if sharing.copy])
        with pytest.raises(ValueError, match="a share for"):
            self.pair.lane.put(sharing.tensor[1:], share=sharing.share)

    def copied(self, tensor: Tensor, share: Share | None) -> Copy | None:
        ticket = self.pair.lane.put(tensor, share=share)
        if isinstance(ticket, Refused):
            self.refused += 1
            assert ticket.cause == "full" and self.copies()
            return None
        self.issued(ticket, copy := Copy(tensor.clone()))
        return copy

    def issued(self, ticket: bytes, copy: Copy) -> None:
        self.puts += 1
        copy.tickets += 1
        self.out.append((ticket, copy))

    # --- tickets -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.out)
    @rule(data=st.data(), fate=st.sampled_from(["take", "take", "discard", "withdraw"]))
    def end_a_ticket(self, data: st.DataObject, fate: str) -> None:
        ticket, copy = self.out.pop(data.draw(st.sampled_from(range(len(self.out))), "ticket"))
        if fate == "take":
            self.taken.append((self.pair.reader.take(ticket), copy))
            return
        copy.tickets -= 1
        if fate == "discard":
            self.pair.discard(ticket)
        else:
            self.pair.lane.withdraw(ticket)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, copy = self.taken.pop(data.draw(st.sampled_from(range(len(self.taken))), "tensor"))
        copy.tickets -= 1

    # --- always --------------------------------------------------------------------------------------------

    def copies(self) -> set[Copy]:
        """Those that may not be freed."""
        found = {copy for _, copy in (*self.out, *self.taken)}
        return found | {sharing.copy for sharing in self.shares if sharing.copy is not None}

    @invariant()
    def what_is_held_is_what_was_put(self) -> None:
        assert all(same(tensor, copy.content) for tensor, copy in self.taken)

    @invariant()
    def memory_is_taken_exactly_as_long_as_a_ticket_or_a_share_refers_to_it(self) -> None:
        stats, copies = self.pair.lane.stats(), self.copies()
        assert all(copy.tickets or copy.shared for copy in copies)
        pages = sum(-(-copy.content.numel() // PAGE) for copy in copies)
        assert held(stats) == (len(self.out) + len(self.taken), len(copies), pages)
        assert (stats.puts, stats.shared, stats.fallbacks.get("full", 0)) == (self.puts, self.shared, self.refused)
        assert stats.malformed_messages == stats.lost_tickets == 0

    def teardown(self) -> None:
        for ticket, copy in self.out:
            assert same(self.pair.reader.take(ticket), copy.content)
        self.out.clear()
        self.taken.clear()
        self.shares.clear()
        assert held(self.pair.lane.stats()) == (0, 0, 0)
        self.scope.__exit__(None, None, None)


Shares.TestCase.settings = settings(max_examples=examples(15, 300), stateful_step_count=40)
TestShares = pytest.mark.long(Shares.TestCase)
