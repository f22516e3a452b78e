"""Where ranges go: every step of the books beside a naive count of pages, over sequences that hypothesis finds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmlane.lane.space import Space
from tests.effort import examples

PAGE = 16  # bytes; the books do not know real ones


class Pages(RuleBasedStateMachine):
    """A Space, and beside it for every page who has it, and for every segment whether it is warm."""

    space: Space

    @initialize(segments=st.integers(1, 9), pages=st.integers(1, 5))
    def start(self, segments: int, pages: int) -> None:
        self.per_segment = pages
        self.owner: list[int | None] = [None] * (segments * pages)  # by page: the offset of the range, or none
        self.warm: set[int] = set()
        self.used: set[int] = set()  # segments used since the last look, in the naive way
        self.space = Space(segments * pages * PAGE, pages * PAGE, PAGE)

    # --- the naive way -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return len(self.owner) * PAGE

    @property
    def segment(self) -> int:
        return self.per_segment * PAGE

    def holes(self) -> list[range]:
        """Runs of free pages, as long as they get."""
        found: list[range] = []
        for page, owner in enumerate(self.owner):
            if owner is not None:
                continue
            if found and found[-1].stop == page:
                found[-1] = range(found[-1].start, page + 1)
            else:
                found.append(range(page, page + 1))
        return found

    def segments(self, pages: range) -> set[int]:
        return {page // self.per_segment for page in pages}

    def wanted(self, nbytes: int) -> range | None:
        """Where a range of that size belongs."""
        count = max(1, (nbytes + PAGE - 1) // PAGE)
        fitting = [hole for hole in self.holes() if len(hole) >= count]
        if not fitting:
            return None

        def price(hole: range) -> tuple[int, int, int]:
            return len(self.segments(hole[:count]) - self.warm), len(hole), hole.start

        return min(fitting, key=price)[:count]

    def ranges(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for owner in self.owner:
            if owner is not None:
                found[owner] = found.get(owner, 0) + PAGE
        return found

    # --- steps ---------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        """Many small ranges, so that giving some back leaves holes of all kinds."""
        for _ in range(data.draw(st.integers(1, 12), "how many")):
            self.take(data)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        sizes = st.integers(0, 4 * PAGE) | st.integers(0, self.capacity + 2 * PAGE)  # mostly small: many ranges
        nbytes = data.draw(sizes, "bytes")
        place = self.wanted(nbytes)
        offset = self.space.find(nbytes)
        assert offset == (None if place is None else place.start * PAGE)
        if place is None or offset is None:
            return
        assert self.space.free() == {hole.start * PAGE: len(hole) * PAGE for hole in self.holes()}  # not taken yet
        self.space.take(offset, nbytes)
        assert all(self.owner[page] is None for page in place)  # no overlap
        for page in place:
            self.owner[page] = offset
        self.used |= self.segments(place)

    @precondition(lambda self: any(owner is not None for owner in self.owner))
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.ranges())), "offset")
        self.space.give(offset)
        pages = [page for page, owner in enumerate(self.owner) if owner == offset]
        for page in pages:
            self.owner[page] = None
        self.used |= self.segments(range(pages[0], pages[-1] + 1))

    @rule(data=st.data())
    def give_what_is_not_taken(self, data: st.DataObject) -> None:
        places = sorted(set(range(-PAGE, self.capacity + 2 * PAGE, PAGE // 2)) - set(self.ranges()))
        with pytest.raises(KeyError):
            self.space.give(data.draw(st.sampled_from(places), "offset"))

    @rule(data=st.data())
    def take_where_no_free_range_begins(self, data: st.DataObject) -> None:
        places = sorted(
            set(range(-PAGE, self.capacity + PAGE, PAGE)) - {hole.start * PAGE for hole in self.holes()}
        )
        with pytest.raises(KeyError):
            self.space.take(data.draw(st.sampled_from(places), "offset"), 1)

    @rule(data=st.data(), warm=st.booleans())
    def memory_comes_and_goes(self, data: st.DataObject, warm: bool) -> None:
        """Also where it was before, and where it was not."""
        count = len(self.owner) // self.per_segment
        first = data.draw(st.integers(0, count - 1), "first segment")
        end = data.draw(st.integers(first + 1, count), "segment after the last")
        if warm:
            self.space.warmed(first * self.segment, (end - first) * self.segment)
            self.warm |= set(range(first, end))
        else:
            self.space.cooled(first * self.segment, (end - first) * self.segment)
            self.warm -= set(range(first, end))

    @rule()
    def look_for_idle_memory(self) -> None:
        in_use = self.segments_in_use()
        assert self.space.idle() == {number * self.segment for number in self.warm - in_use - self.used}
        self.used.clear()

    def segments_in_use(self) -> set[int]:
        return {page // self.per_segment for page, owner in enumerate(self.owner) if owner is not None}

    @rule(data=st.data())
    def ask_about_any_range(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, len(self.owner) - 1), "first page")
        end = data.draw(st.integers(first + 1, len(self.owner)), "page after the last")
        offset, nbytes = first * PAGE, (end - first) * PAGE
        assert self.space.is_free(offset, nbytes) == all(owner is None for owner in self.owner[first:end])
        runs = self.space.cold(offset, nbytes)
        touched = self.segments(range(first, end))
        assert {at for start, size in runs for at in range(start, start + size, self.segment)} == {
            number * self.segment for number in touched - self.warm
        }
        assert all(start + size < later for (start, size), (later, _) in pairwise(runs))

    # --- always --------------------------------------------------------------------------------------------

    @invariant()
    def the_figures_are_right(self) -> None:
        taken = self.ranges()
        assert self.space.taken() == taken
        assert self.space.taken_bytes == sum(taken.values())
        assert self.space.taken_count == len(taken)
        assert self.space.warm_bytes == len(self.warm) * self.segment
        assert self.space.warm() == [(number * self.segment, self.segment) for number in sorted(self.warm)]

    @invariant()
    def what_is_free_is_in_pieces_as_large_as_can_be(self) -> None:
        wanted = [(hole.start * PAGE, len(hole) * PAGE) for hole in self.holes()]
        assert list(self.space.free().items()) == wanted  # in order too

    @invariant()
    def what_is_handed_out_is_the_callers(self) -> None:
        """Whoever changes the answer does not change the books."""
        self.space.taken().clear()
        self.space.free().clear()

    def teardown(self) -> None:
        """All given back: one free range."""
        for offset in self.ranges():
            self.space.give(offset)
        assert self.space.free() == {0: self.space.capacity}
        assert self.space.taken_bytes == 0


Pages.TestCase.settings = settings(max_examples=examples(100, 1000), stateful_step_count=50)
TestPages = Pages.TestCase


# --- cases that have to be right in any case ---------------------------------------------------------------


def taken(space: Space, nbytes: int) -> int:
    """The offset of a range, taken."""
    offset = space.find(nbytes)
    assert offset is not None
    space.take(offset, nbytes)
    return offset


def test_the_whole_capacity_in_one_and_nothing_more() -> None:
    space = Space(256, 64, PAGE)
    assert taken(space, 256) == 0
    assert space.find(1) is None and space.find(0) is None and space.free() == {}
    assert not space.is_free(0, 1) and not space.is_free(240, 16)
    space.give(0)
    assert space.free() == {0: 256} and space.is_free(0, 256)
    assert space.find(257) is None


def test_even_nothing_takes_a_page_so_that_offsets_are_unique() -> None:
    space = Space(256, 64, PAGE)
    assert [taken(space, 0), taken(space, 1), taken(space, PAGE), taken(space, PAGE + 1)] == [0, 16, 32, 48]
    assert space.taken() == {0: 16, 16: 16, 32: 16, 48: 32}


def test_the_tightest_hole_wins_over_the_lowest() -> None:
    space = Space(256, 64, PAGE)
    space.warmed(0, 256)
    for _ in range(16):
        taken(space, PAGE)
    for offset in (16, 32, 48, 96, 160, 176):  # holes of 3, 1 and 2 pages
        space.give(offset)
    assert [space.find(size * PAGE) for size in (1, 2, 3, 4)] == [96, 160, 16, None]


def test_warm_memory_wins_over_the_tightest_hole() -> None:
    space = Space(256, 64, PAGE)
    taken(space, 48)
    assert space.find(16) == 48
    taken(space, 16)
    taken(space, 64)
    space.give(48)  # a hole of one page in a cold segment; the rest is free from 128 on
    space.warmed(128, 64)
    assert space.find(16) == 128
    space.cooled(128, 64)
    assert space.find(16) == 48


def test_less_cold_memory_wins_where_none_is_all_warm() -> None:
    space = Space(320, 64, PAGE)
    for _ in range(5):
        taken(space, 64)
    space.give(0)  # one segment's room, cold
    for offset in (128, 192, 256):
        space.give(offset)
    space.warmed(128, 64)
    assert space.find(64) == 128
    assert space.find(128) == 128  # one cold segment, though the hole is larger than it need be


def test_neighbours_grow_together_on_both_sides() -> None:
    space = Space(256, 64, PAGE)
    first, middle, last = taken(space, 64), taken(space, 64), taken(space, 64)
    space.give(first)
    space.give(last)
    assert space.free() == {0: 64, 128: 128}
    space.give(middle)
    assert space.free() == {0: 256}


def test_memory_that_was_used_between_two_looks_is_not_idle() -> None:
    space = Space(256, 64, PAGE)
    space.warmed(0, 128)
    assert space.idle() == {0, 64}
    space.give(taken(space, 16))
    assert space.idle() == {64}  # used and given back since
    assert space.idle() == {0, 64}
    offset = taken(space, 80)  # into the second segment
    assert space.idle() == set()
    assert space.idle() == set()  # in use, though nothing happened
    space.give(offset)
    assert space.idle() == set()  # given back since
    assert space.idle() == {0, 64}
    space.cooled(0, 64)
    assert space.idle() == {64}  # what has no memory is not idle memory


def test_cold_runs_are_joined_and_whole_segments() -> None:
    space = Space(320, 64, PAGE)
    space.warmed(128, 64)
    assert space.cold(70, 200) == [(64, 64), (192, 128)]
    assert space.cold(0, 320) == [(0, 128), (192, 128)]
    assert space.cold(130, 10) == []


@pytest.mark.parametrize(
    ("capacity", "segment", "page"),
    [
        (0, 64, 16),
        (-64, 64, 16),
        (65, 64, 16),
        (96, 64, 16),
        (64, 0, 16),
        (64, -64, 16),
        (64, 24, 16),
        (64, 8, 16),
        (64, 64, 0),
        (64, 64, -16),
        (32, 64, 16),
    ],
)
def test_sizes_that_do_not_divide_each_other_are_refused(capacity: int, segment: int, page: int) -> None:
    with pytest.raises(ValueError, match=f"capacity {capacity}, segment {segment}, page {page}"):
        Space(capacity, segment, page)


def test_the_smallest_of_all() -> None:
    space = Space(1, 1, 1)
    assert taken(space, 1) == 0 and space.find(0) is None


@pytest.mark.parametrize("pinned", [-64, 16, 320])
def test_pinned_bytes_are_whole_segments_within_the_capacity(pinned: int) -> None:
    with pytest.raises(ValueError, match=f"{pinned} pinned bytes: whole segments of 64, 256 at most"):
        Space(256, 64, PAGE, pinned)


@pytest.mark.parametrize(("pinned", "idle"), [(0, {0, 64, 128, 192}), (128, {128, 192}), (256, set())])
def test_pinned_segments_are_never_idle(pinned: int, idle: set[int]) -> None:
    space = Space(256, 64, PAGE, pinned)
    space.warmed(0, 256)
    assert space.idle() == idle


def test_taking_twice_and_giving_twice_is_an_error_and_changes_nothing() -> None:
    space = Space(256, 64, PAGE)
    offset = taken(space, 20)
    before = space.taken(), space.free()
    with pytest.raises(KeyError):
        space.take(offset, 20)
    with pytest.raises(KeyError):
        space.give(offset + PAGE)  # inside a range is not a range
    assert (space.taken(), space.free()) == before
    space.give(offset)
    with pytest.raises(KeyError):
        space.give(offset)
    assert space.free() == {0: 256}
