"""Which bytes of a lane are used, and which have memory behind them. Bookkeeping only: it touches no memory."""

from __future__ import annotations

from bisect import bisect_left, insort


class Allocator:
    """Places ranges in [0, capacity): best fit, coalescing, where memory is already committed before elsewhere.

    All offsets and sizes are bytes, multiples of `page`. Memory is committed and decommitted in segments of
    `segment` bytes. The first `pinned` bytes are never idle.
    """

    def __init__(self, capacity: int, segment: int, page: int, pinned: int = 0) -> None:
        if not 0 < page <= segment or segment % page or capacity % segment or capacity <= 0:
            raise ValueError(
                f"capacity {capacity}, segment {segment}, page {page}: each must divide the one before"
            )
        if not 0 <= pinned <= capacity or pinned % segment:
            raise ValueError(f"{pinned} pinned bytes: whole segments of {segment}, {capacity} at most")
        self.capacity = capacity
        self.segment = segment
        self.page = page
        self.pinned = pinned
        self.used: dict[int, int] = {}  # offset -> size, of ranges
        self.unused: dict[int, int] = {0: capacity}  # the others, likewise
        self._starts: list[int] = [0]  # the free ranges' starts, in order
        self._committed: set[int] = set()  # numbers of segments
        self._touched: set[int] = set()  # committed segments that were used since the last look

    def rounded(self, nbytes: int) -> int:
        """The size of the range that holds `nbytes`: whole pages, at least one."""
        return max(-(-nbytes // self.page), 1) * self.page

    def find(self, nbytes: int) -> int | None:
        """Where a range would go, without using it: least uncommitted memory, then tightest fit, then lowest."""
        size = self.rounded(nbytes)
        best: tuple[int, int, int] | None = None
        for start in self._starts:
            room = self.unused[start]
            if room < size:
                continue
            key = (self._uncommitted_count(start, size), room, start)
            if best is None or key < best:
                best = key
                if key[:2] == (0, size):
                    break
        return None if best is None else best[2]

    def place(self, nbytes: int) -> tuple[int | None, list[tuple[int, int]]]:
        """Where a range would go, and the (offset, nbytes) ranges of whole segments to commit for it."""
        offset = self.find(nbytes)
        return offset, [] if offset is None else self.uncommitted(offset, nbytes)

    def use(self, offset: int, nbytes: int) -> None:
        """Use a range for `nbytes` at a place that `find` gave. Raises KeyError where no free range begins."""
        size = self.rounded(nbytes)
        room = self._remove_free(offset)
        if room > size:
            self._add_free(offset + size, room - size)
        self.used[offset] = size
        self._touched.update(self._segments(offset, size))

    def free(self, offset: int) -> None:
        """Free a used range. Raises KeyError when it is not used."""
        size = self.used.pop(offset)
        self._touched.update(self._segments(offset, size))
        at = bisect_left(self._starts, offset)
        if at < len(self._starts) and self._starts[at] == offset + size:
            size += self._remove_free(offset + size)
        if at > 0 and self._starts[at - 1] + self.unused[self._starts[at - 1]] == offset:
            before = self._starts[at - 1]
            size += self._remove_free(before)
            offset = before
        self._add_free(offset, size)

    def _add_free(self, start: int, size: int) -> None:
        self.unused[start] = size
        insort(self._starts, start)

    def _remove_free(self, start: int) -> int:
        room = self.unused.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        return room

    def _segments(self, offset: int, nbytes: int) -> range:
        return range(offset // self.segment, -(-(offset + nbytes) // self.segment))

    def _uncommitted_count(self, offset: int, nbytes: int) -> int:
        return len([number for number in self._segments(offset, nbytes) if number not in self._committed])

    def uncommitted(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """The (offset, nbytes) ranges of whole segments that a range needs and that have no memory."""
        runs: list[list[int]] = []
        for number in self._segments(offset, nbytes):
            if number in self._committed:
                continue
            if runs and runs[-1][1] == number:
                runs[-1][1] = number + 1
            else:
                runs.append([number, number + 1])
        return [(first * self.segment, (end - first) * self.segment) for first, end in runs]

    def note_committed(self, offset: int, nbytes: int) -> None:
        """Note that these segments have memory now."""
        self._committed.update(self._segments(offset, nbytes))

    def note_decommitted(self, offset: int, nbytes: int) -> None:
        """Note that these segments have none any more."""
        self._committed.difference_update(self._segments(offset, nbytes))

    def is_committed(self, offset: int) -> bool:
        """Whether the segment at an offset has memory."""
        return offset // self.segment in self._committed

    def idle(self) -> list[int]:
        """Offsets of the committed segments that were not used since the last call, in order."""
        in_use = {number for offset, size in self.used.items() for number in self._segments(offset, size)}
        idle = self._committed - in_use - self._touched - set(range(self.pinned // self.segment))
        self._touched.clear()
        return [number * self.segment for number in sorted(idle)]

    def is_free(self, offset: int, nbytes: int) -> bool:
        """Whether nothing in a range is used."""
        at = bisect_left(self._starts, offset + 1) - 1
        if at < 0:
            return False
        start = self._starts[at]
        return offset + nbytes <= start + self.unused[start]

    @property
    def used_bytes(self) -> int:
        """Bytes in used ranges."""
        return sum(self.used.values())

    @property
    def committed_bytes(self) -> int:
        """Bytes with memory behind them."""
        return len(self._committed) * self.segment
