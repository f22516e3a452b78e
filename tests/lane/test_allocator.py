"""Where ranges go: every step of the allocator beside a naive count of pages, in any order hypothesis finds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmlane.lane.allocator import Allocator
from tests.effort import examples

PAGE = 16  # bytes; the allocator does not know real ones


class Pages(RuleBasedStateMachine):
    """An Allocator, and beside it for every page whose it is, and for every segment whether it has memory."""

    allocator: Allocator

    @initialize(segments=st.integers(1, 9), pages=st.integers(1, 5))
    def start(self, segments: int, pages: int) -> None:
        self.per_segment = pages
        self.owner: list[int | None] = [None] * (segments * pages)  # by page: the offset of the range, or none
        self.has_memory: set[int] = set()
        self.touched: set[int] = set()  # segments used since the last look, in the naive way
        self.allocator = Allocator(segments * pages * PAGE, pages * PAGE, PAGE)

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
            return len(self.segments(hole[:count]) - self.has_memory), len(hole), hole.start

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
        """Many small ranges, so that freeing some leaves holes of all kinds."""
        for _ in range(data.draw(st.integers(1, 12), "how many")):
            self.use(data)

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        sizes = st.integers(0, 4 * PAGE) | st.integers(0, self.capacity + 2 * PAGE)  # mostly small: many ranges
        nbytes = data.draw(sizes, "bytes")
        place = self.wanted(nbytes)
        offset = self.allocator.find(nbytes)
        assert offset == (None if place is None else place.start * PAGE)
        if place is None or offset is None:
            return
        assert self.allocator.unused == {
            hole.start * PAGE: len(hole) * PAGE for hole in self.holes()
        }  # not used yet
        self.allocator.use(offset, nbytes)
        assert all(self.owner[page] is None for page in place)  # no overlap
        for page in place:
            self.owner[page] = offset
        self.touched |= self.segments(place)

    @precondition(lambda self: any(owner is not None for owner in self.owner))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.ranges())), "offset")
        self.allocator.free(offset)
        pages = [page for page, owner in enumerate(self.owner) if owner == offset]
        for page in pages:
            self.owner[page] = None
        self.touched |= self.segments(range(pages[0], pages[-1] + 1))

    @rule(data=st.data())
    def free_what_is_not_used(self, data: st.DataObject) -> None:
        places = sorted(set(range(-PAGE, self.capacity + 2 * PAGE, PAGE // 2)) - set(self.ranges()))
        with pytest.raises(KeyError):
            self.allocator.free(data.draw(st.sampled_from(places), "offset"))

    @rule(data=st.data())
    def use_where_no_free_range_begins(self, data: st.DataObject) -> None:
        places = sorted(
            set(range(-PAGE, self.capacity + PAGE, PAGE)) - {hole.start * PAGE for hole in self.holes()}
        )
        with pytest.raises(KeyError):
            self.allocator.use(data.draw(st.sampled_from(places), "offset"), 1)

    @rule(data=st.data(), comes=st.booleans())
    def memory_comes_and_goes(self, data: st.DataObject, comes: bool) -> None:
        """Also where it was before, and where it was not."""
        count = len(self.owner) // self.per_segment
        first = data.draw(st.integers(0, count - 1), "first segment")
        end = data.draw(st.integers(first + 1, count), "segment after the last")
        if comes:
            self.allocator.note_committed(first * self.segment, (end - first) * self.segment)
            self.has_memory |= set(range(first, end))
        else:
            self.allocator.note_decommitted(first * self.segment, (end - first) * self.segment)
            self.has_memory -= set(range(first, end))

    @rule()
    def look_for_idle_memory(self) -> None:
        in_use = self.segments_in_use()
        idle = self.has_memory - in_use - self.touched
        assert self.allocator.idle() == [number * self.segment for number in sorted(idle)]
        self.touched.clear()

    def segments_in_use(self) -> set[int]:
        return {page // self.per_segment for page, owner in enumerate(self.owner) if owner is not None}

    @rule(data=st.data())
    def ask_about_any_range(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, len(self.owner) - 1), "first page")
        end = data.draw(st.integers(first + 1, len(self.owner)), "page after the last")
        offset, nbytes = first * PAGE, (end - first) * PAGE
        assert self.allocator.is_free(offset, nbytes) == all(owner is None for owner in self.owner[first:end])
        runs = self.allocator.uncommitted(offset, nbytes)
        touched = self.segments(range(first, end))
        assert {at for start, size in runs for at in range(start, start + size, self.segment)} == {
            number * self.segment for number in touched - self.has_memory
        }
        assert all(start + size < later for (start, size), (later, _) in pairwise(runs))

    # --- always --------------------------------------------------------------------------------------------

    @invariant()
    def the_figures_are_right(self) -> None:
        used = self.ranges()
        assert self.allocator.used == used
        assert self.allocator.used_bytes == sum(used.values())
        assert self.allocator.committed_bytes == len(self.has_memory) * self.segment
        count = len(self.owner) // self.per_segment
        committed = {number for number in range(count) if self.allocator.is_committed(number * self.segment)}
        assert committed == self.has_memory

    @invariant()
    def what_is_free_is_in_pieces_as_large_as_can_be(self) -> None:
        wanted = [(hole.start * PAGE, len(hole) * PAGE) for hole in self.holes()]
        assert sorted(self.allocator.unused.items()) == wanted

    def teardown(self) -> None:
        """All freed: one free range."""
        for offset in self.ranges():
            self.allocator.free(offset)
        assert self.allocator.unused == {0: self.allocator.capacity}
        assert self.allocator.used_bytes == 0


Pages.TestCase.settings = settings(max_examples=examples(100, 1000), stateful_step_count=50)
TestPages = Pages.TestCase


# --- cases that have to be right in any case ---------------------------------------------------------------


def used(allocator: Allocator, nbytes: int) -> int:
    """The offset of a range that is used now."""
    offset = allocator.find(nbytes)
    assert offset is not None
    allocator.use(offset, nbytes)
    return offset


def test_the_whole_capacity_in_one_and_nothing_more() -> None:
    allocator = Allocator(256, 64, PAGE)
    assert used(allocator, 256) == 0
    assert allocator.find(1) is None and allocator.find(0) is None and allocator.unused == {}
    assert not allocator.is_free(0, 1) and not allocator.is_free(240, 16)
    allocator.free(0)
    assert allocator.unused == {0: 256} and allocator.is_free(0, 256)
    assert allocator.find(257) is None


def test_an_empty_range_uses_a_page_so_that_offsets_are_unique() -> None:
    allocator = Allocator(256, 64, PAGE)
    assert [used(allocator, 0), used(allocator, 1), used(allocator, PAGE), used(allocator, PAGE + 1)] == [
        0,
        16,
        32,
        48,
    ]
    assert allocator.used == {0: 16, 16: 16, 32: 16, 48: 32}


def test_the_tightest_hole_wins_over_the_lowest() -> None:
    allocator = Allocator(256, 64, PAGE)
    allocator.note_committed(0, 256)
    for _ in range(16):
        used(allocator, PAGE)
    for offset in (16, 32, 48, 96, 160, 176):  # holes of 3, 1 and 2 pages
        allocator.free(offset)
    assert [allocator.find(size * PAGE) for size in (1, 2, 3, 4)] == [96, 160, 16, None]


def test_committed_memory_wins_over_the_tightest_hole() -> None:
    allocator = Allocator(256, 64, PAGE)
    used(allocator, 48)
    assert allocator.find(16) == 48
    used(allocator, 16)
    used(allocator, 64)
    allocator.free(48)  # a hole of one page in an uncommitted segment; the rest is free from 128 on
    allocator.note_committed(128, 64)
    assert allocator.find(16) == 128
    allocator.note_decommitted(128, 64)
    assert allocator.find(16) == 48


def test_less_uncommitted_memory_wins_where_none_is_all_committed() -> None:
    allocator = Allocator(320, 64, PAGE)
    for _ in range(5):
        used(allocator, 64)
    allocator.free(0)  # one segment's room, uncommitted
    for offset in (128, 192, 256):
        allocator.free(offset)
    allocator.note_committed(128, 64)
    assert allocator.find(64) == 128
    assert allocator.find(128) == 128  # one uncommitted segment, though the hole is larger than it need be


def test_a_place_is_found_with_what_has_to_be_committed_there() -> None:
    allocator = Allocator(256, 64, PAGE)
    assert allocator.place(100) == (0, [(0, 128)])
    allocator.note_committed(0, 64)
    assert allocator.place(100) == (0, [(64, 64)])
    assert allocator.place(64) == (0, []) and allocator.place(257) == (None, [])
    assert allocator.used == {}


def test_neighbours_grow_together_on_both_sides() -> None:
    allocator = Allocator(256, 64, PAGE)
    first, middle, last = used(allocator, 64), used(allocator, 64), used(allocator, 64)
    allocator.free(first)
    allocator.free(last)
    assert allocator.unused == {0: 64, 128: 128}
    allocator.free(middle)
    assert allocator.unused == {0: 256}


def test_memory_that_was_used_between_two_looks_is_not_idle() -> None:
    allocator = Allocator(256, 64, PAGE)
    allocator.note_committed(0, 128)
    assert allocator.idle() == [0, 64]
    allocator.free(used(allocator, 16))
    assert allocator.idle() == [64]  # used and freed since
    assert allocator.idle() == [0, 64]
    offset = used(allocator, 80)  # into the second segment
    assert allocator.idle() == []
    assert allocator.idle() == []  # in use, though nothing happened
    allocator.free(offset)
    assert allocator.idle() == []  # freed since
    assert allocator.idle() == [0, 64]
    allocator.note_decommitted(0, 64)
    assert allocator.idle() == [64]  # what has no memory is not idle memory


def test_uncommitted_runs_are_joined_and_whole_segments() -> None:
    allocator = Allocator(320, 64, PAGE)
    allocator.note_committed(128, 64)
    assert allocator.uncommitted(70, 200) == [(64, 64), (192, 128)]
    assert allocator.uncommitted(0, 320) == [(0, 128), (192, 128)]
    assert allocator.uncommitted(130, 10) == []


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
        Allocator(capacity, segment, page)


def test_a_capacity_of_one_byte() -> None:
    allocator = Allocator(1, 1, 1)
    assert used(allocator, 1) == 0 and allocator.find(0) is None


@pytest.mark.parametrize("pinned", [-64, 16, 320])
def test_pinned_bytes_are_whole_segments_within_the_capacity(pinned: int) -> None:
    with pytest.raises(ValueError, match=f"{pinned} pinned bytes: whole segments of 64, 256 at most"):
        Allocator(256, 64, PAGE, pinned)


@pytest.mark.parametrize(("pinned", "idle"), [(0, [0, 64, 128, 192]), (128, [128, 192]), (256, [])])
def test_pinned_segments_are_never_idle(pinned: int, idle: list[int]) -> None:
    allocator = Allocator(256, 64, PAGE, pinned)
    allocator.note_committed(0, 256)
    assert allocator.idle() == idle


def test_using_twice_and_freeing_twice_is_an_error_and_changes_nothing() -> None:
    allocator = Allocator(256, 64, PAGE)
    offset = used(allocator, 20)
    before = dict(allocator.used), dict(allocator.unused)
    with pytest.raises(KeyError):
        allocator.use(offset, 20)
    with pytest.raises(KeyError):
        allocator.free(offset + PAGE)  # inside a range is not a range
    assert (allocator.used, allocator.unused) == before
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)
    assert allocator.unused == {0: 256}
