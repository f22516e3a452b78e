"""Puts and kept copies in any order beside a model: nothing is ever read but what was copied, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mmlane.lane import LaneError, Refused, Reservation
from tests.effort import examples
from tests.lane.harness.lane_with_readers import PAGE, held, lane_with_readers, offset, published
from tests.lane.harness.payloads import random, same

ALIASES: dict[str, Callable[[Tensor], object]] = {
    "slice": lambda tensor: tensor[3:5],
    "array": lambda tensor: tensor.numpy(),
    "storage": lambda tensor: tensor.untyped_storage(),
}


@dataclass(eq=False)
class Copy:
    """A copy in the lane as it has to be. keepers: its reservation until that ends, and aliases of its tensor."""

    content: Tensor
    tickets: int = 0
    keepers: int = 0
    had_a_ticket: bool = False
    offset: int | None = None  # once it is known


class KeptCopies(RuleBasedStateMachine):
    """Tensors that are written to, put, copied and published in any order, beside what tickets have to read."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = lane_with_readers(capacity=32 * PAGE, segment=2 * PAGE)
        self.pair = self.scope.__enter__()
        self.tensors: list[Tensor] = []
        self.kept: list[tuple[Reservation, Copy]] = []
        self.closed: list[Reservation] = []
        self.aliases: list[tuple[Any, Copy]] = []
        self.out: list[tuple[bytes, Copy]] = []
        self.taken: list[tuple[Tensor, Copy]] = []
        self.puts = self.shared = self.refused = self.copied = 0

    def which(self, data: st.DataObject, many: list[Any]) -> int:
        return data.draw(st.sampled_from(range(len(many))), "which")

    # --- tensors -------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tensors) < 4)
    @rule(pages=st.integers(0, 3), seed=st.integers(0, 9))
    def make(self, pages: int, seed: int) -> None:
        self.tensors.append(random((pages * PAGE + 8,), seed=seed))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), how=st.integers(0, 2), by=st.integers(1, 255))
    def write(self, data: st.DataObject, how: int, by: int) -> None:
        tensor: Any = self.tensors[self.which(data, self.tensors)]
        [lambda: tensor.add_(by), lambda: tensor.data.add_(by), lambda: tensor.numpy().__iadd__(by)][how]()

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop_a_tensor(self, data: st.DataObject) -> None:
        del self.tensors[self.which(data, self.tensors)]

    # --- copies --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        tensor = self.tensors[self.which(data, self.tensors)]
        ticket = self.pair.lane.put(tensor)
        copy = self.copied_of(tensor, ticket)
        if isinstance(ticket, bytes):
            self.issued(ticket, copy)

    @precondition(lambda self: self.tensors and len(self.kept) < 5)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        tensor = self.tensors[self.which(data, self.tensors)]
        reservation = self.pair.lane.copy(tensor)
        copy = self.copied_of(tensor, reservation)
        if isinstance(reservation, Reservation):
            copy.keepers = 1
            self.kept.append((reservation, copy))

    def copied_of(self, tensor: Tensor, answer: object) -> Copy:
        if isinstance(answer, Refused):
            self.refused += 1
            assert answer.cause == "full" and self.copies()
        else:
            self.copied += tensor.numel()
        return Copy(tensor.clone())

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), times=st.integers(1, 5))
    def publish(self, data: st.DataObject, times: int) -> None:
        reservation, copy = self.kept[self.which(data, self.kept)]
        for _ in range(times):
            self.issued(published(reservation), copy)

    def issued(self, ticket: bytes, copy: Copy) -> None:
        assert copy.offset in (None, offset(ticket))
        self.puts += 1
        self.shared += copy.had_a_ticket
        copy.had_a_ticket, copy.offset = True, offset(ticket)
        copy.tickets += 1
        self.out.append((ticket, copy))

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), how=st.sampled_from(sorted(ALIASES)))
    def alias(self, data: st.DataObject, how: str) -> None:
        reservation, copy = self.kept[self.which(data, self.kept)]
        copy.keepers += 1
        self.aliases.append((ALIASES[how](reservation.tensor), copy))

    @precondition(lambda self: self.aliases)
    @rule(data=st.data())
    def drop_an_alias(self, data: st.DataObject) -> None:
        _, copy = self.aliases.pop(self.which(data, self.aliases))
        copy.keepers -= 1

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), how=st.sampled_from(["closed", "dropped"]))
    def end(self, data: st.DataObject, how: str) -> None:
        reservation, copy = self.kept.pop(self.which(data, self.kept))
        copy.keepers -= 1
        if how == "closed":
            reservation.close()
            self.closed.append(reservation)

    @precondition(lambda self: self.closed)
    @rule(data=st.data(), drop=st.booleans())
    def use_what_is_closed(self, data: st.DataObject, drop: bool) -> None:
        which = self.which(data, self.closed)
        reservation = self.closed[which]
        reservation.close()
        with pytest.raises(LaneError, match="closed"):
            reservation.publish()
        if drop:
            del self.closed[which]

    # --- tickets -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.out)
    @rule(data=st.data(), fate=st.sampled_from(["take", "take", "discard", "withdraw"]))
    def end_a_ticket(self, data: st.DataObject, fate: str) -> None:
        ticket, copy = self.out.pop(self.which(data, self.out))
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
        _, copy = self.taken.pop(self.which(data, self.taken))
        copy.tickets -= 1

    # --- always --------------------------------------------------------------------------------------------

    def copies(self) -> set[Copy]:
        """Those that may not be freed."""
        return {copy for _, copy in (*self.out, *self.taken, *self.kept, *self.aliases)}

    @invariant()
    def what_is_held_is_what_was_copied(self) -> None:
        assert all(same(tensor, copy.content) for tensor, copy in self.taken)
        assert all(same(reservation.tensor, copy.content) for reservation, copy in self.kept)

    @invariant()
    def memory_is_used_exactly_as_long_as_something_refers_to_it(self) -> None:
        """A ticket, a reservation, or an alias of its tensor."""
        stats, copies = self.pair.lane.stats(), self.copies()
        assert all(copy.tickets or copy.keepers for copy in copies)
        pages = sum(-(-copy.content.numel() // PAGE) for copy in copies)
        assert held(stats) == (len(self.out) + len(self.taken), len(copies), pages)
        assert (stats.puts, stats.shared, stats.copied_bytes) == (self.puts, self.shared, self.copied)
        assert stats.fallbacks == ({"full": self.refused} if self.refused else {})
        assert stats.malformed_messages == stats.lost_tickets == 0

    def teardown(self) -> None:
        for ticket, copy in self.out:
            assert same(self.pair.reader.take(ticket), copy.content)
        for many in (self.out, self.taken, self.kept, self.aliases):
            many.clear()
        assert held(self.pair.lane.stats()) == (0, 0, 0)
        self.scope.__exit__(None, None, None)


KeptCopies.TestCase.settings = settings(max_examples=examples(15, 300), stateful_step_count=40)
TestKeptCopies = pytest.mark.long(KeptCopies.TestCase)
