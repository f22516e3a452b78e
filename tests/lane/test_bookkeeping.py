"""The lane's books beside a model written from the invariants: nothing is freed early, all is freed in the end.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmlane.lane.ledger import Extent, Ledger, Live
from mmlane.lane.space import Space
from tests.effort import examples

PAGE = 16
SEGMENT = 4 * PAGE
CAPACITY = 6 * SEGMENT
SLOTS = 5
EXPECTED = {"tp": 2, "dp": 1}
GROUPS = ["tp", "dp"]
NUMBERS = range(7)  # of readers; numbers of the dead are given to new ones


@dataclass(eq=False)
class Out:
    """A ticket as the invariants see it. waiting: who may have it still."""

    live: Live
    extent: Extent
    at: float
    waiting: dict[int, str]
    heard_of: bool = False  # some reader has given it back
    ended: bool = False


@dataclass(eq=False)
class Held:
    """An extent as the invariants see it."""

    tickets: set[Out] = field(default_factory=set)
    shared: bool = False


class Books(RuleBasedStateMachine):
    """A Ledger in the hands of a lane that only issues while it is open (1), and of readers who say anything."""

    ledger: Ledger

    @initialize()
    def start(self) -> None:
        self.space = Space(CAPACITY, SEGMENT, PAGE)
        self.ledger = Ledger(self.space, SLOTS, dict(EXPECTED), self.on_end)
        self.readers: dict[int, str] = {}
        self.out: list[Out] = []  # every ticket there ever was
        self.extents: dict[Extent, Held] = {}  # those that may not be freed
        self.ends: Counter[tuple[int, int]] = Counter()  # slot, serial -> how often on_end was called
        self.orphans = 0
        self.clock = 0.0
        self.changing = False  # within a call that may end tickets
        self.let_in_whom_the_lane_waits_for()

    # --- the model -----------------------------------------------------------------------------------------

    def on_end(self, slot: int) -> None:
        """Before the extent of a ticket can be taken again, its digest has to be gone (5)."""
        assert self.changing
        ticket = self.ledger.live[slot]
        self.ends[slot, ticket.serial] += 1
        assert self.space.taken()[ticket.extent.offset] == ticket.extent.nbytes

    def live(self) -> list[Out]:
        return [ticket for ticket in self.out if not ticket.ended]

    def is_open(self) -> bool:
        return all(list(self.readers.values()).count(group) >= count for group, count in EXPECTED.items())

    def end(self, ticket: Out) -> None:
        ticket.ended = True
        held = self.extents[ticket.extent]
        held.tickets.remove(ticket)
        if not held.tickets and not held.shared:
            del self.extents[ticket.extent]

    def owes(self, reader: int, ticket: Out) -> bool:
        return not ticket.ended and reader in ticket.waiting

    def done(self, reader: int, ticket: Out) -> None:
        del ticket.waiting[reader]
        if not ticket.waiting:
            self.end(ticket)

    # --- readers -------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.readers) < len(NUMBERS))
    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def join(self, data: st.DataObject, group: str) -> None:
        number = data.draw(st.sampled_from([number for number in NUMBERS if number not in self.readers]), "number")
        self.check_join(number, group)

    def check_join(self, number: int, group: str) -> None:
        floor = self.ledger.join(number, group)
        self.readers[number] = group
        assert floor == max((ticket.live.serial for ticket in self.out), default=floor)

    @precondition(lambda self: not self.is_open() and len(self.readers) < len(NUMBERS) - 3)
    @rule()
    def let_in_whom_the_lane_waits_for(self) -> None:
        """A lane that is not open issues nothing: by chance alone it would not be open often."""
        for group, count in EXPECTED.items():
            for _ in range(count - list(self.readers.values()).count(group)):
                self.check_join(min(set(NUMBERS) - set(self.readers)), group)
        assert self.ledger.is_open()

    @precondition(lambda self: len(self.readers) > 4)
    @rule(data=st.data())
    def one_of_many_leaves(self, data: st.DataObject) -> None:
        self.leave(data)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """In whatever state (4)."""
        number = data.draw(st.sampled_from(sorted(self.readers)), "number")
        self.changing = True
        self.ledger.leave(number)
        self.changing = False
        del self.readers[number]
        for ticket in self.live():
            if number in ticket.waiting:
                self.done(number, ticket)

    @rule(number=st.sampled_from(NUMBERS))
    def somebody_leaves_who_is_not_there(self, number: int) -> None:
        if number not in self.readers:
            self.ledger.leave(number)

    # --- extents -------------------------------------------------------------------------------------------

    def issue(self, extent: Extent) -> None:
        self.clock += 1
        ticket = self.ledger.issue(extent, self.clock)
        if len(self.live()) == SLOTS:
            assert ticket is None
            return
        assert ticket is not None and ticket.extent is extent and 0 <= ticket.slot < SLOTS
        assert ticket.slot not in {other.live.slot for other in self.live()}
        assert all(ticket.serial > other.live.serial for other in self.out)
        new = Out(ticket, extent, self.clock, dict(self.readers))
        self.out.append(new)
        self.extents[extent].tickets.add(new)

    @precondition(lambda self: self.is_open())
    @rule(nbytes=st.integers(0, CAPACITY), shared=st.booleans())
    def put(self, nbytes: int, shared: bool) -> None:
        """As the lane does it: a place, the copy, perhaps a share that holds it, a ticket or none."""
        offset = self.space.find(nbytes)
        if offset is None:
            return
        taken = self.space.taken()
        extent = self.ledger.allocate(offset, nbytes)
        assert (extent.offset, extent.nbytes) == (offset, self.space.rounded(nbytes))
        assert all(offset + extent.nbytes <= at or at + size <= offset for at, size in taken.items())  # (6)
        if shared:
            self.ledger.hold(extent)
        self.extents[extent] = Held(shared=shared)
        self.issue(extent)
        if not self.extents[extent].tickets:
            self.ledger.settle(extent)
            if not shared:
                del self.extents[extent]

    @precondition(lambda self: self.is_open())
    @rule(nbytes=st.integers(0, CAPACITY))
    def put_that_fails_before_its_ticket(self, nbytes: int) -> None:
        offset = self.space.find(nbytes)
        if offset is not None:
            self.ledger.settle(self.ledger.allocate(offset, nbytes))

    @precondition(lambda self: self.is_open() and self.extents)
    @rule(data=st.data(), times=st.integers(1, SLOTS + 1))
    def put_again(self, data: st.DataObject, times: int) -> None:
        """Until there are no slots any more, and once more."""
        extent = data.draw(st.sampled_from(list(self.extents)), "extent")
        for _ in range(times):
            self.issue(extent)
        if not self.extents[extent].tickets:
            self.ledger.settle(extent)  # nothing to settle: it is shared, or it would not be there

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(list(self.extents)), "extent")
        self.ledger.hold(extent)
        self.extents[extent].shared = True

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(list(self.extents)), "extent")
        self.ledger.let_go(extent)
        self.extents[extent].shared = False
        if not self.extents[extent].tickets:
            del self.extents[extent]

    # --- what readers say: anything about any ticket, also twice, late, or of no ticket that ever was ---------

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reader=st.sampled_from(NUMBERS))
    def give_back(self, data: st.DataObject, reader: int) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        owed = self.owes(reader, ticket)
        self.changing = True
        assert self.ledger.give_back(reader, ticket.live.slot, ticket.live.serial) == owed
        self.changing = False
        if owed:
            if not ticket.heard_of:  # its group is known from now on (2)
                ticket.heard_of = True
                group = ticket.waiting[reader]
                ticket.waiting = {who: theirs for who, theirs in ticket.waiting.items() if theirs == group}
            self.done(reader, ticket)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def give_back_by_all_of_a_group(self, data: st.DataObject) -> None:
        """What happens when nothing goes wrong; by chance alone it would hardly ever."""
        ticket = data.draw(st.sampled_from(self.live()), "ticket")
        group = data.draw(st.sampled_from(sorted(set(ticket.waiting.values()))), "group")
        self.changing = True
        ticket.heard_of = True
        for reader in [reader for reader, theirs in ticket.waiting.items() if theirs == group]:
            assert not ticket.ended
            assert self.ledger.give_back(reader, ticket.live.slot, ticket.live.serial)
            ticket.waiting = {who: theirs for who, theirs in ticket.waiting.items() if theirs == group}
            self.done(reader, ticket)
        self.changing = False
        assert ticket.ended

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reader=st.sampled_from(NUMBERS))
    def forgo(self, data: st.DataObject, reader: int) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        self.check_forgo(reader, ticket)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def forgo_by_all(self, data: st.DataObject) -> None:
        """A ticket that was lost: nobody has it (3)."""
        ticket = data.draw(st.sampled_from(self.live()), "ticket")
        for reader in list(ticket.waiting):
            assert not ticket.ended
            self.check_forgo(reader, ticket)
        assert ticket.ended

    def check_forgo(self, reader: int, ticket: Out) -> None:
        owed = self.owes(reader, ticket)
        self.changing = True
        assert self.ledger.forgo(reader, ticket.live.slot, ticket.live.serial) == owed
        self.changing = False
        if owed:
            self.done(reader, ticket)
            self.orphans += ticket.ended  # the last one has said that it never had it (3)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        possible = not ticket.ended and not ticket.heard_of
        self.changing = True
        assert self.ledger.withdraw(ticket.live.slot, ticket.live.serial) == possible
        self.changing = False
        if possible:
            self.end(ticket)

    @rule(
        reader=st.sampled_from(NUMBERS),
        slot=st.integers(0, SLOTS + 1) | st.integers(0, (1 << 64) - 1),
        serial=st.integers(0, (1 << 64) - 1),
    )
    def nonsense(self, reader: int, slot: int, serial: int) -> None:
        if serial not in {ticket.live.serial for ticket in self.live()}:
            assert not self.ledger.give_back(reader, slot, serial)
            assert not self.ledger.forgo(reader, slot, serial)
            assert not self.ledger.withdraw(slot, serial)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), reader=st.sampled_from(NUMBERS), by=st.integers(1, SLOTS))
    def the_right_serial_in_another_slot(self, data: st.DataObject, reader: int, by: int) -> None:
        live = data.draw(st.sampled_from(self.live()), "ticket").live
        assert not self.ledger.give_back(reader, live.slot + by, live.serial)
        assert not self.ledger.forgo(reader, live.slot - by, live.serial)
        assert not self.ledger.withdraw(live.slot + by, live.serial)

    # --- always --------------------------------------------------------------------------------------------

    @invariant()
    def memory_is_taken_exactly_as_long_as_something_refers_to_it(self) -> None:
        """Not freed while a ticket is out (2, 6) or a share holds it, freed when there is neither."""
        assert self.space.taken() == {extent.offset: extent.nbytes for extent in self.extents}
        assert all(held.tickets or held.shared for held in self.extents.values())

    @invariant()
    def extents_know_their_tickets(self) -> None:
        assert {extent: (extent.tickets, extent.shared) for extent in self.extents} == {
            extent: (len(held.tickets), held.shared) for extent, held in self.extents.items()
        }

    @invariant()
    def every_ticket_ends_once(self) -> None:
        assert self.ledger.live == {ticket.live.slot: ticket.live for ticket in self.live()}
        assert self.ends == Counter((ticket.live.slot, ticket.live.serial) for ticket in self.out if ticket.ended)

    @invariant()
    def who_owes_what(self) -> None:
        """All readers there were, one group from the first give-back on, nobody who joined later, nobody dead."""
        for ticket in self.live():
            owed = {reader: group for group, readers in ticket.live.owed.items() for reader in readers}
            assert owed == ticket.waiting
            assert ticket.live.debtors() == set(ticket.waiting)
            assert set(ticket.waiting) <= set(self.readers)

    @invariant()
    def the_lane_is_open_while_all_expected_readers_are_there(self) -> None:
        """(1)"""
        assert self.ledger.is_open() == self.is_open()
        assert self.ledger.readers == self.readers

    @invariant()
    def orphans_are_counted(self) -> None:
        """(3)"""
        assert self.ledger.orphans == self.orphans
        for before in (0.0, self.clock / 2, self.clock + 1):
            assert self.ledger.issued_before(before) == [out.live for out in self.live() if out.at < before]

    def teardown(self) -> None:
        """When all readers are gone and no share is left, nothing is left (4)."""
        self.changing = True
        for number in list(self.readers):
            self.ledger.leave(number)
        assert self.ledger.live == {}
        for extent, held in self.extents.items():
            if held.shared:
                self.ledger.let_go(extent)
        assert self.space.free() == {0: CAPACITY}
        assert not self.ledger.is_open()
        assert self.ends == Counter((ticket.live.slot, ticket.live.serial) for ticket in self.out)


Books.TestCase.settings = settings(max_examples=examples(150, 1500), stateful_step_count=60)
TestBooks = Books.TestCase


# --- stories -----------------------------------------------------------------------------------------------


class Story:
    """Books in which readers 1 and 2 of `tp` and 3 of `dp` have joined, and the slots of tickets that ended."""

    def __init__(self, slots: int = 4) -> None:
        self.ended: list[int] = []
        self.space = Space(CAPACITY, SEGMENT, PAGE)
        self.ledger = Ledger(self.space, slots, dict(EXPECTED), self.ended.append)
        for reader, group in ((1, "tp"), (2, "tp"), (3, "dp")):
            self.ledger.join(reader, group)

    def extent(self, nbytes: int = PAGE) -> Extent:
        offset = self.space.find(nbytes)
        assert offset is not None
        return self.ledger.allocate(offset, nbytes)

    def issue(self, extent: Extent | None = None) -> Live:
        ticket = self.ledger.issue(extent or self.extent(), 0.0)
        assert ticket is not None
        return ticket


def test_the_first_to_give_back_tells_whose_a_ticket_is() -> None:
    """(2): the other group never had it, and need not say so."""
    story = Story()
    ticket = story.issue()
    assert story.ledger.give_back(2, ticket.slot, ticket.serial)
    assert not story.ledger.give_back(3, ticket.slot, ticket.serial)
    assert not story.ledger.forgo(3, ticket.slot, ticket.serial)
    assert story.space.taken_bytes == PAGE and story.ended == []
    assert story.ledger.give_back(1, ticket.slot, ticket.serial)
    assert story.space.taken_bytes == 0 and story.ended == [ticket.slot]


def test_a_ticket_that_one_reader_has_had_cannot_be_withdrawn() -> None:
    """(3): the other reader of the group has it, or will."""
    story = Story()
    ticket = story.issue()
    assert story.ledger.give_back(1, ticket.slot, ticket.serial)
    assert not story.ledger.withdraw(ticket.slot, ticket.serial)
    assert story.space.taken_bytes == PAGE and story.ended == []
    assert story.ledger.give_back(2, ticket.slot, ticket.serial)
    assert story.space.taken_bytes == 0 and story.ended == [ticket.slot]


def test_a_group_that_forgoes_leaves_the_ticket_to_the_other() -> None:
    """(3): it is no orphan as long as somebody may have it."""
    story = Story()
    ticket = story.issue()
    for reader in (1, 2):
        assert story.ledger.forgo(reader, ticket.slot, ticket.serial)
    assert story.ledger.orphans == 0 and story.ledger.live
    assert story.ledger.give_back(3, ticket.slot, ticket.serial)
    assert story.ledger.orphans == 0 and not story.ledger.live


def test_a_ticket_that_all_forgo_is_an_orphan() -> None:
    """(3)"""
    story = Story()
    ticket = story.issue()
    for reader in (3, 1, 2):
        assert story.ledger.live
        assert story.ledger.forgo(reader, ticket.slot, ticket.serial)
    assert story.ledger.orphans == 1 and story.space.taken_bytes == 0


def test_a_ticket_that_one_of_the_group_never_got_is_an_orphan_as_well() -> None:
    """(3): lost on its way to one rank only."""
    story = Story()
    ticket = story.issue()
    assert story.ledger.give_back(1, ticket.slot, ticket.serial)
    assert story.ledger.issued_before(1.0) == [ticket]
    assert story.ledger.forgo(2, ticket.slot, ticket.serial)
    assert story.ledger.orphans == 1 and story.space.taken_bytes == 0


def test_the_death_of_the_last_one_that_could_have_it_frees_it() -> None:
    """(4)"""
    story = Story()
    ticket = story.issue()
    story.ledger.give_back(1, ticket.slot, ticket.serial)
    story.ledger.leave(3)
    assert story.ledger.live
    story.ledger.leave(2)
    assert not story.ledger.live and story.space.taken_bytes == 0


def test_who_joins_later_owes_only_what_comes_later() -> None:
    story = Story()
    before = story.issue()
    floor = story.ledger.join(4, "tp")
    after = story.issue()
    assert before.serial <= floor < after.serial
    assert not story.ledger.give_back(4, before.slot, before.serial)
    for reader in (1, 2):
        assert story.ledger.give_back(reader, before.slot, before.serial)
        assert story.ledger.give_back(reader, after.slot, after.serial)
    assert list(story.ledger.live.values()) == [after]
    assert story.ledger.give_back(4, after.slot, after.serial)
    assert not story.ledger.live


def test_a_new_reader_with_the_number_of_a_dead_one_does_not_owe_its_tickets() -> None:
    story = Story()
    ticket = story.issue()
    story.ledger.leave(1)
    story.ledger.join(1, "tp")
    assert not story.ledger.give_back(1, ticket.slot, ticket.serial)
    assert story.ledger.give_back(2, ticket.slot, ticket.serial)
    assert not story.ledger.live


def test_a_slot_that_is_used_again_is_another_ticket() -> None:
    """(5): what is said late of the ticket before does not touch the one that has its slot now."""
    story = Story(slots=1)
    extent = story.extent()
    first = story.issue(extent)
    assert story.ledger.issue(extent, 0.0) is None
    assert extent.tickets == 1
    for reader in (1, 2):
        story.ledger.give_back(reader, first.slot, first.serial)
    second = story.issue()
    assert second.slot == first.slot and second.serial != first.serial
    assert not story.ledger.give_back(1, first.slot, first.serial)
    assert not story.ledger.forgo(2, first.slot, first.serial)
    assert not story.ledger.withdraw(first.slot, first.serial)
    assert list(story.ledger.live.values()) == [second] and story.ended == [first.slot]


def test_a_share_holds_an_extent_over_the_ends_of_its_tickets() -> None:
    story = Story()
    extent = story.extent()
    story.ledger.hold(extent)
    first, second = story.issue(extent), story.issue(extent)
    assert story.ledger.withdraw(first.slot, first.serial)
    assert story.ledger.withdraw(second.slot, second.serial)
    assert (extent.tickets, story.space.taken_bytes) == (0, PAGE)
    third = story.issue(extent)
    story.ledger.let_go(extent)
    assert story.space.taken_bytes == PAGE
    assert story.ledger.withdraw(third.slot, third.serial)
    assert story.space.taken_bytes == 0


def test_a_shared_extent_without_a_slot_for_its_first_ticket_waits_for_the_next() -> None:
    """Nothing is lost when tickets have run out between the copy and the ticket."""
    story = Story(slots=1)
    story.issue()
    extent = story.extent()
    story.ledger.hold(extent)
    assert story.ledger.issue(extent, 0.0) is None
    story.ledger.settle(extent)
    assert story.space.taken_bytes == 2 * PAGE
    story.ledger.let_go(extent)
    assert story.space.taken_bytes == PAGE


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lane_that_lost_a_reader_is_not_open_until_another_comes(lost: int) -> None:
    """(1)"""
    story = Story()
    group = story.ledger.readers[lost]
    assert story.ledger.is_open()
    story.ledger.leave(lost)
    assert not story.ledger.is_open()
    story.ledger.join(9, "dp" if group == "tp" else "tp")
    assert not story.ledger.is_open()  # one more in the other group does not make up for it
    story.ledger.join(10, group)
    assert story.ledger.is_open()


def test_serials_of_two_lanes_do_not_meet() -> None:
    one, two = Story().issue(), Story().issue()
    assert abs(one.serial - two.serial) > 1 << 16
