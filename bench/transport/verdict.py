"""The goals, each met or missed, and the ratios to keep, computed from the records and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.ratios import Spread
from bench.releases import NEWEST
from bench.transport.cases import FAN_OUT, JUDGED, ONE_WAY, Case, size
from bench.transport.records import Record, find

_FLAT = 1.2  # what counts as not growing; medians of a few rounds vary by that much
_FIRST, _LAST = 1, 8  # readers


@dataclass(frozen=True)
class Goal:
    """`figure` is None when the records do not hold what it takes."""

    text: str
    limit: float
    figure: float | None
    unit: str
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        met = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        return "met" if met else "MISSED"

    @property
    def found(self) -> str:
        return "" if self.figure is None else f"{self.figure:.3g}{self.unit}"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"


def goals(records: Sequence[Record]) -> list[Goal]:
    return list(_goals(records))


def _goals(records: Sequence[Record]) -> Iterator[Goal]:
    def of(label: str, value: Callable[[Record], float | None], **case: int) -> float | None:
        record = find(records, label, Case(**{"readers": 1, "nbytes": JUDGED, **case}))
        return value(record) if record is not None else None

    at = size(JUDGED)
    for mode, limit in (("view", 1.3), ("cow", 3.5)):
        figure = of(f"lane {mode}", lambda r: _ratio(r.median_s, r.memcpy_s))
        yield Goal(f"lane {mode} over a plain copy, {at}, 1 reader", limit, figure, " x")
    for engine, view, cow in ((NEWEST, 10, 5), ("0.5.12.post1", 25, 10)):
        theirs = of(f"engine {engine}", lambda r: r.median_s)
        for mode, limit in (("view", float(view)), ("cow", float(cow))):
            figure = _ratio(theirs, of(f"lane {mode}", lambda r: r.median_s))
            yield Goal(f"engine {engine} over lane {mode}", limit, figure, " x", at_least=True)
    figure = _ratio(of("lane view", _producer, readers=_LAST), of("lane view", _producer, readers=_FIRST))
    yield Goal(f"lane view, put and free, {_LAST} readers over {_FIRST}", _FLAT, figure, " x")
    figure = _ratio(of("lane view", lambda r: r.put_s, n=FAN_OUT), of("lane view", lambda r: r.put_s))
    yield Goal(f"lane view, put, n = {FAN_OUT} over n = 1", _FLAT, figure, " x")
    for mode in ("view", "cow"):
        yield Goal(f"lane {mode}, memory over payload", 1.05, of(f"lane {mode}", lambda r: r.memory_x), " x")
    latency = find(records, "lane view", Case(1, ONE_WAY), "one-way")
    one_way = latency.median_s * 1e6 if latency is not None and latency.median_s is not None else None
    yield Goal(f"lane view, one way, {size(ONE_WAY)}, median", 100, one_way, " us")


def ratios(records: Sequence[Record]) -> dict[str, Spread | None]:
    """The lane over the newest engine and over a plain copy, in each case measured; spread over rounds."""
    found: dict[str, Spread | None] = {}
    for case in sorted({record.case for record in records if record.measure == "cost"}):
        theirs = _spread(find(records, f"engine {NEWEST}", case))
        for mode in ("view", "cow"):
            record = find(records, f"lane {mode}", case)
            ours = _spread(record)
            if ours and theirs:
                found[f"{case}: lane {mode} over engine {NEWEST}"] = ours.over(theirs)
            if ours and record and record.memcpy_s and mode == "view":
                copy = record.memcpy_s
                found[f"{case}: lane view over memcpy"] = ours.over(Spread(copy, copy, copy))
    return found


def _spread(record: Record | None) -> Spread | None:
    if record is None or record.median_s is None or record.min_s is None or record.max_s is None:
        return None
    return Spread(record.median_s, record.min_s, record.max_s)


def _producer(record: Record) -> float | None:
    if record.put_s is None or record.free_producer_s is None:
        return None
    return record.put_s + record.free_producer_s


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
