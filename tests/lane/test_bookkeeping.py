"""The lane's bookkeeping beside a model written from the invariants: nothing is freed early, all is in the end.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmlane.lane.allocator import Allocator
from mmlane.lane.bookkeeping import Bookkeeping, Extent, Hold, Kept, Live, Member
from tests.effort import examples

PAGE = 16
SEGMENT = 4 * PAGE
CAPACITY = 6 * SEGMENT
SLOTS = 5
GROUPS = {"tp": frozenset({0, 1}), "dp": frozenset({0}), "dp2": frozenset({0, 1, 2})}
MEMBERS = [Member(group, number) for group, numbers in GROUPS.items() for number in sorted(numbers)]
OTHERS = [Member("tp", 2), Member("other", 0), Member("", -1)]


@dataclass(eq=False)
class Out:
    """A ticket as the invariants see it. waiting: the members that may have it still."""

    live: Live
    extent: Extent
    at: float
    waiting: set[Member]
    claimed: bool = False  # some member has released it
    groups: set[str] = field(default_factory=lambda: set(GROUPS))  # it may be for; one once that is known
    unseen_in: set[str] = field(default_factory=set)  # groups with members that never had it
    ended: bool = False


@dataclass(eq=False)
class Held:
    """An extent as the invariants see it. kept: by its hold, or by one that was dropped and not handled yet."""

    hold: Hold | None
    kept: bool = True
    tickets: set[Out] = field(default_factory=set)


class Tickets(RuleBasedStateMachine):
    """The bookkeeping in the hands of a lane that is open (1), and of readers that say anything."""

    bookkeeping: Bookkeeping

    @initialize()
    def start(self) -> None:
        self.allocator = Allocator(CAPACITY, SEGMENT, PAGE)
        self.bookkeeping = Bookkeeping(self.allocator, SLOTS, GROUPS, self.on_end)
        self.out: list[Out] = []  # every ticket there ever was
        self.extents: dict[Extent, Held] = {}  # those that may not be freed
        self.dropped: deque[Kept] = deque()
        self.ends: Counter[tuple[int, int]] = Counter()  # slot, serial -> how often on_end was called
        self.lost = 0
        self.clock = 0.0
        self.changing = False  # within a call that may end tickets

    # --- the model -----------------------------------------------------------------------------------------

    def on_end(self, slot: int) -> None:
        """Before the extent of a ticket can be used again, its digest has to be gone (5)."""
        assert self.changing
        ticket = self.bookkeeping.live[slot]
        self.ends[slot, ticket.serial] += 1
        assert self.allocator.used[ticket.extent.offset] == ticket.extent.nbytes

    def live(self) -> list[Out]:
        return [ticket for ticket in self.out if not ticket.ended]

    def end(self, ticket: Out) -> None:
        ticket.ended = True
        self.extents[ticket.extent].tickets.remove(ticket)
        self.settle(ticket.extent)

    def settle(self, extent: Extent) -> None:
        held = self.extents[extent]
        if not held.tickets and not held.kept:
            del self.extents[extent]

    def done(self, member: Member, ticket: Out) -> None:
        ticket.waiting.remove(member)
        if not ticket.waiting:
            self.lost += bool(ticket.unseen_in & ticket.groups)  # one that it was for never had it (3)
            self.end(ticket)

    def owes(self, member: Member, ticket: Out) -> bool:
        return not ticket.ended and member in ticket.waiting

    # --- extents -------------------------------------------------------------------------------------------

    def issue(self, extent: Extent) -> None:
        self.clock += 1
        ticket = self.bookkeeping.issue(extent, self.clock)
        if len(self.live()) == SLOTS:
            assert ticket is None
            return
        assert ticket is not None and ticket.extent is extent and 0 <= ticket.slot < SLOTS
        assert ticket.slot not in {other.live.slot for other in self.live()}
        assert all(ticket.serial > other.live.serial for other in self.out)
        assert ticket.issued == self.clock
        new = Out(ticket, extent, self.clock, set(MEMBERS))
        self.out.append(new)
        self.extents[extent].tickets.add(new)

    def let_go(self, extent: Extent, hold: Hold) -> None:
        self.bookkeeping.let_go(hold)
        assert hold.extent is None
        self.bookkeeping.let_go(hold)  # once more is nothing
        self.extents[extent].kept = False
        self.extents[extent].hold = None
        self.settle(extent)

    def allocate(self, nbytes: int) -> tuple[Extent, Hold] | None:
        offset = self.allocator.find(nbytes)
        if offset is None:
            return None
        used = dict(self.allocator.used)
        hold = Hold(self.dropped.append)
        extent = self.bookkeeping.allocate(offset, nbytes, hold)
        assert (extent.offset, extent.nbytes) == (offset, self.allocator.rounded(nbytes))
        assert hold.extent is extent
        assert all(offset + extent.nbytes <= at or at + size <= offset for at, size in used.items())  # (6)
        self.extents[extent] = Held(hold)
        return extent, hold

    @rule(nbytes=st.integers(0, CAPACITY))
    def copy(self, nbytes: int) -> None:
        """As the lane does it: a place, and what keeps it until its reservation ends."""
        self.allocate(nbytes)

    @rule(nbytes=st.integers(0, CAPACITY))
    def put(self, nbytes: int) -> None:
        """As the lane does it: a place, the copy, a ticket or none."""
        made = self.allocate(nbytes)
        if made is not None:
            self.issue(made[0])
            self.let_go(*made)

    @rule(nbytes=st.integers(0, CAPACITY))
    def put_that_fails_before_its_ticket(self, nbytes: int) -> None:
        """Whatever it is: its hold goes with its frame."""
        made = self.allocate(nbytes)
        if made is not None:
            self.extents[made[0]].hold = None
            del made
            self.handle_dropped()

    @precondition(lambda self: self.extents)
    @rule(data=st.data(), times=st.integers(1, SLOTS + 1))
    def put_again(self, data: st.DataObject, times: int) -> None:
        """Until there are no slots any more, and once more."""
        extent = data.draw(st.sampled_from(list(self.extents)), "extent")
        for _ in range(times):
            self.issue(extent)

    @precondition(lambda self: any(held.hold for held in self.extents.values()))
    @rule(data=st.data(), how=st.sampled_from(["let go", "dropped", "dropped in a cycle"]))
    def end_a_hold(self, data: st.DataObject, how: str) -> None:
        held_ones = [extent for extent, held in self.extents.items() if held.hold]
        extent = data.draw(st.sampled_from(held_ones), "extent")
        hold, self.extents[extent].hold = self.extents[extent].hold, None
        assert hold is not None
        noted = len(self.dropped)
        if how == "let go":
            self.let_go(extent, hold)
            del hold
            assert len(self.dropped) == noted
            return
        if how == "dropped":
            del hold
        else:
            cycle: list[Any] = [hold]
            cycle.append(cycle)
            del cycle, hold
            gc.collect(0)
            gc.collect(1)
        assert len(self.dropped) == noted + 1

    @precondition(lambda self: self.dropped)
    @rule()
    def handle_dropped(self) -> None:
        """The lane does it some time later."""
        while self.dropped:
            self.bookkeeping.dropped(self.dropped.popleft())
        for extent, held in list(self.extents.items()):
            held.kept = held.hold is not None
            self.settle(extent)

    # --- what readers say: anything about any ticket, also twice, late, or of no ticket that ever was ---------

    @precondition(lambda self: self.out)
    @rule(data=st.data(), member=st.sampled_from([*MEMBERS, *OTHERS]))
    def release(self, data: st.DataObject, member: Member) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        self.check_release(member, ticket)

    def check_release(self, member: Member, ticket: Out) -> None:
        owed = self.owes(member, ticket)
        self.changing = owed
        assert self.bookkeeping.release(member, ticket.live.slot, ticket.live.serial)  # it was issued
        self.changing = False
        if owed:
            if not ticket.claimed:  # its group is known from now on (2)
                ticket.claimed = True
                ticket.groups = {member.group}
                ticket.waiting = {other for other in ticket.waiting if other.group == member.group}
            self.done(member, ticket)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def release_by_all_of_a_group(self, data: st.DataObject) -> None:
        """What happens when nothing goes wrong; by chance alone it would hardly ever."""
        ticket = data.draw(st.sampled_from(self.live()), "ticket")
        group = data.draw(st.sampled_from(sorted({member.group for member in ticket.waiting})), "group")
        for member in [member for member in MEMBERS if member in ticket.waiting and member.group == group]:
            assert not ticket.ended
            self.check_release(member, ticket)
        assert ticket.ended

    @precondition(lambda self: self.out)
    @rule(data=st.data(), member=st.sampled_from([*MEMBERS, *OTHERS]))
    def not_seen(self, data: st.DataObject, member: Member) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        self.check_not_seen(member, ticket)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def seen_by_no_reader(self, data: st.DataObject) -> None:
        """A ticket that was lost (3)."""
        ticket = data.draw(st.sampled_from(self.live()), "ticket")
        for member in list(ticket.waiting):
            assert not ticket.ended
            self.check_not_seen(member, ticket)
        assert ticket.ended

    def check_not_seen(self, member: Member, ticket: Out) -> None:
        owed = self.owes(member, ticket)
        self.changing = owed
        assert self.bookkeeping.not_seen(member, ticket.live.slot, ticket.live.serial)
        self.changing = False
        if owed:
            ticket.unseen_in.add(member.group)
            self.done(member, ticket)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.out[-12:]), "ticket")
        possible = not ticket.ended and not ticket.claimed
        self.changing = possible
        self.bookkeeping.withdraw(ticket.live.slot, ticket.live.serial)
        self.changing = False
        if possible:
            self.end(ticket)

    @rule(
        member=st.sampled_from(MEMBERS),
        slot=st.integers(0, SLOTS + 1) | st.integers(0, (1 << 64) - 1),
        serial=st.integers(0, (1 << 64) - 1),
    )
    def nonsense(self, member: Member, slot: int, serial: int) -> None:
        if serial not in {ticket.live.serial for ticket in self.out}:
            assert not self.bookkeeping.release(member, slot, serial)
            assert not self.bookkeeping.not_seen(member, slot, serial)
            self.bookkeeping.withdraw(slot, serial)

    @precondition(lambda self: self.out)
    @rule(beyond=st.integers(1, 3), member=st.sampled_from(MEMBERS), slot=st.integers(0, SLOTS))
    def serials_just_beyond_those_issued(self, beyond: int, member: Member, slot: int) -> None:
        for serial in (self.out[0].live.serial - beyond, self.out[-1].live.serial + beyond):
            assert not self.bookkeeping.release(member, slot, serial)
            assert not self.bookkeeping.not_seen(member, slot, serial)
            self.bookkeeping.withdraw(slot, serial)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), member=st.sampled_from(MEMBERS), by=st.integers(1, SLOTS))
    def the_right_serial_in_another_slot(self, data: st.DataObject, member: Member, by: int) -> None:
        """Changes nothing."""
        live = data.draw(st.sampled_from(self.live()), "ticket").live
        self.bookkeeping.release(member, live.slot + by, live.serial)
        self.bookkeeping.not_seen(member, live.slot - by, live.serial)
        self.bookkeeping.withdraw(live.slot + by, live.serial)

    # --- always --------------------------------------------------------------------------------------------

    @invariant()
    def memory_is_used_exactly_as_long_as_something_refers_to_it(self) -> None:
        """Not freed while a ticket is out (2, 6) or a hold keeps it, freed when there is neither."""
        assert self.allocator.used == {extent.offset: extent.nbytes for extent in self.extents}
        assert all(held.tickets or held.kept for held in self.extents.values())

    @invariant()
    def extents_know_their_tickets(self) -> None:
        assert {extent: (extent.tickets, extent.kept) for extent in self.extents} == {
            extent: (len(held.tickets), held.kept) for extent, held in self.extents.items()
        }

    @invariant()
    def every_ticket_ends_once(self) -> None:
        assert self.bookkeeping.live == {ticket.live.slot: ticket.live for ticket in self.live()}
        assert self.ends == Counter((ticket.live.slot, ticket.live.serial) for ticket in self.out if ticket.ended)

    @invariant()
    def who_owes_what(self) -> None:
        """All members, one group from the first release on."""
        for ticket in self.live():
            debtors = ticket.live.debtors()
            assert len(debtors) == len(set(debtors)) and set(debtors) == ticket.waiting
            assert ticket.live.claimed == ticket.claimed

    @invariant()
    def lost_tickets_are_counted(self) -> None:
        """(3)"""
        assert self.bookkeeping.lost == self.lost

    def teardown(self) -> None:
        """When all members have released all tickets and no hold is left, nothing is left (4)."""
        for ticket in self.live():
            for member in MEMBERS:
                self.check_release(member, ticket)
        assert self.bookkeeping.live == {}
        for held in self.extents.values():
            held.hold = None
        self.handle_dropped()
        assert self.allocator.unused == {0: CAPACITY}
        assert self.ends == Counter((ticket.live.slot, ticket.live.serial) for ticket in self.out)


Tickets.TestCase.settings = settings(max_examples=examples(150, 1500), stateful_step_count=60)
TestTickets = Tickets.TestCase


# --- stories -----------------------------------------------------------------------------------------------

TP0, TP1, DP0 = Member("tp", 0), Member("tp", 1), Member("dp", 0)


class Story:
    """Bookkeeping for members 0 and 1 of `tp` and 0 of `dp`, and the slots of tickets that ended."""

    def __init__(self, slots: int = 4) -> None:
        self.ended: list[int] = []
        self.dropped: deque[Kept] = deque()
        self.allocator = Allocator(CAPACITY, SEGMENT, PAGE)
        groups = {"tp": frozenset({0, 1}), "dp": frozenset({0})}
        self.bookkeeping = Bookkeeping(self.allocator, slots, groups, self.ended.append)

    def extent(self, nbytes: int = PAGE) -> tuple[Extent, Hold]:
        offset, hold = self.allocator.find(nbytes), Hold(self.dropped.append)
        assert offset is not None
        return self.bookkeeping.allocate(offset, nbytes, hold), hold

    def issue(self, extent: Extent | None = None) -> Live:
        """A ticket on an extent, by default one that nothing else keeps."""
        new, hold = self.extent() if extent is None else (extent, None)
        ticket = self.bookkeeping.issue(new, 0.0)
        assert ticket is not None
        if hold is not None:
            self.bookkeeping.let_go(hold)
        return ticket

    def release(self, member: Member, ticket: Live) -> None:
        assert self.bookkeeping.release(member, ticket.slot, ticket.serial)

    def not_seen(self, member: Member, ticket: Live) -> None:
        assert self.bookkeeping.not_seen(member, ticket.slot, ticket.serial)

    def withdraw(self, ticket: Live) -> None:
        self.bookkeeping.withdraw(ticket.slot, ticket.serial)


def test_the_first_release_decides_which_group_owns_a_ticket() -> None:
    """(2): the other group never had it, and need not say so."""
    story = Story()
    ticket = story.issue()
    story.release(TP1, ticket)
    assert ticket.debtors() == [TP0]
    story.release(DP0, ticket)
    story.not_seen(DP0, ticket)
    assert story.allocator.used_bytes == PAGE and story.ended == []
    story.release(TP0, ticket)
    assert story.allocator.used_bytes == 0 and story.ended == [ticket.slot]


def test_a_release_that_is_said_twice_counts_once() -> None:
    """A reader whose sending was interrupted may say it again."""
    story = Story()
    ticket = story.issue()
    for _ in range(3):
        story.release(TP1, ticket)
    assert ticket.debtors() == [TP0] and story.ended == []
    for _ in range(3):
        story.release(TP0, ticket)
    assert story.ended == [ticket.slot]


def test_a_ticket_that_one_member_has_had_cannot_be_withdrawn() -> None:
    """(3): the other member of the group has it, or will."""
    story = Story()
    ticket = story.issue()
    story.release(TP0, ticket)
    story.withdraw(ticket)
    assert story.allocator.used_bytes == PAGE and story.ended == []
    story.release(TP1, ticket)
    assert story.allocator.used_bytes == 0 and story.ended == [ticket.slot]


def test_a_group_that_has_not_seen_a_ticket_leaves_it_to_the_other() -> None:
    """(3): it is not lost as long as a reader may have it."""
    story = Story()
    ticket = story.issue()
    for member in (TP0, TP1):
        story.not_seen(member, ticket)
    assert story.bookkeeping.lost == 0 and story.bookkeeping.live
    story.release(DP0, ticket)
    assert story.bookkeeping.lost == 0 and not story.bookkeeping.live


def test_a_ticket_that_no_reader_has_seen_is_lost() -> None:
    """(3)"""
    story = Story()
    ticket = story.issue()
    for member in (DP0, TP0, TP1):
        assert story.bookkeeping.live
        story.not_seen(member, ticket)
    assert story.bookkeeping.lost == 1 and story.allocator.used_bytes == 0


@pytest.mark.parametrize("first", ["the one that had it", "the other"])
def test_a_ticket_that_one_of_the_group_never_got_is_lost_as_well(first: str) -> None:
    """(3): on its way to one rank only."""
    story = Story()
    ticket = story.issue()
    if first == "the other":
        story.not_seen(TP1, ticket)
    story.release(TP0, ticket)
    if first != "the other":
        assert list(story.bookkeeping.live.values()) == [ticket]
        story.not_seen(TP1, ticket)
    assert story.bookkeeping.lost == 1 and story.allocator.used_bytes == 0


def test_a_slot_that_is_used_again_is_another_ticket() -> None:
    """(5): what is said late of the ticket before does not touch the one that has its slot now."""
    story = Story(slots=1)
    extent, _hold = story.extent()
    first = story.issue(extent)
    assert story.bookkeeping.issue(extent, 0.0) is None
    assert extent.tickets == 1
    for member in (TP0, TP1):
        story.release(member, first)
    second = story.issue()
    assert second.slot == first.slot and second.serial != first.serial
    for member in (TP0, DP0):
        story.release(member, first)
        story.not_seen(member, first)
    story.withdraw(first)
    assert list(story.bookkeeping.live.values()) == [second] and story.ended == [first.slot]
    assert set(second.debtors()) == {TP0, TP1, DP0}


def test_a_hold_keeps_an_extent_over_the_ends_of_its_tickets() -> None:
    story = Story()
    extent, hold = story.extent()
    story.withdraw(story.issue(extent))
    story.withdraw(story.issue(extent))
    assert (extent.tickets, story.allocator.used_bytes) == (0, PAGE)
    third = story.issue(extent)
    story.bookkeeping.let_go(hold)
    assert story.allocator.used_bytes == PAGE
    story.withdraw(third)
    assert story.allocator.used_bytes == 0


def test_an_extent_without_a_slot_for_its_first_ticket_is_kept_by_its_hold() -> None:
    """Nothing is lost when tickets have run out between the copy and the ticket: there can be one later."""
    story = Story(slots=1)
    other = story.issue()
    extent, hold = story.extent()
    assert story.bookkeeping.issue(extent, 0.0) is None
    assert story.allocator.used_bytes == 2 * PAGE
    story.withdraw(other)
    ticket = story.issue(extent)
    story.withdraw(ticket)
    assert story.allocator.used_bytes == PAGE
    story.bookkeeping.let_go(hold)
    assert story.allocator.used_bytes == 0


def test_a_hold_that_is_dropped_is_noted_and_no_more() -> None:
    """Python may collect it in the middle of whatever is done here."""
    story = Story()
    extent, hold = story.extent()
    del hold
    assert (extent.kept, story.allocator.used_bytes) == (True, PAGE)
    (kept,) = story.dropped
    story.bookkeeping.dropped(kept)
    assert (extent.kept, story.allocator.used_bytes) == (False, 0)


def test_a_hold_that_was_let_go_is_not_noted_when_it_is_dropped() -> None:
    """Its place may be another's by then."""
    story = Story()
    _, hold = story.extent()
    story.bookkeeping.let_go(hold)
    extent, _another = story.extent()
    del hold
    assert not story.dropped and extent.kept


def test_a_hold_that_keeps_nothing_can_end() -> None:
    """A put may fail before it has found a place."""
    story = Story()
    story.bookkeeping.let_go(Hold(story.dropped.append))
    assert not story.dropped and story.allocator.used_bytes == 0


def test_a_hold_may_outlive_the_bookkeeping() -> None:
    story = Story()
    _, hold = story.extent()
    del story
    gc.collect()
    del hold


def test_serials_of_two_lanes_do_not_overlap() -> None:
    one, two = Story().issue(), Story().issue()
    assert abs(one.serial - two.serial) > 1 << 16


@pytest.mark.parametrize(("member", "says"), [(TP1, "reader 1 of 'tp'"), (DP0, "reader 0 of 'dp'")])
def test_a_member_as_text(member: Member, says: str) -> None:
    assert str(member) == says
