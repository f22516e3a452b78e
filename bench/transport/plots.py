"""The records as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import plots
from bench.harness.plots import pyplot
from bench.harness.sizes import JUDGED, size
from bench.transport.records import COST, Results
from bench.transport.ways import MEMCPY, WAYS
from mmlane.bench.case import Case

_ORDER = [*(way.label for way in WAYS), MEMCPY]
_HUES = ("#08519c", "#4292c6", "#9ecae1", "#fcbba1", "#fb6a4a", "#a50f15", "#807dba", "#41ab5d", "black")
_COLOURS = dict(zip(_ORDER, _HUES, strict=True))  # of one family what is of one kind
_PARTS = ("put_s", "take_s", "first_read_extra_s", "free_reader_s", "free_producer_s")
_BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write what the records have figures for; the paths."""
    cases = [c for c in results.cases(COST) if any(r.status == "ok" for r in results.of(COST, c))]
    plain = [case for case in cases if case.n == case.items == 1]
    drawn = []
    for readers in sorted({case.readers for case in plain}):
        chosen = [case for case in plain if case.readers == readers]
        if len(chosen) > 1:
            title = f"Cost of a message, {readers} reader{'s' * (readers > 1)}"
            path = directory / f"size-{readers}.png"
            drawn.append(_lines(results, chosen, lambda case: case.nbytes, title, "payload", path))
    for nbytes in sorted({case.nbytes for case in plain}):
        chosen = [case for case in plain if case.nbytes == nbytes]
        if len(chosen) > 2:
            path = directory / f"readers-{size(nbytes).replace(' ', '')}.png"
            title = f"Cost of a message of {size(nbytes)}"
            drawn.append(_lines(results, chosen, lambda case: case.readers, title, "readers", path))
    if any(results.values(COST, Case(1, JUDGED), way, "cost_s") for way in _ORDER):
        drawn.append(_bars(results, Case(1, JUDGED), directory / "parts.png"))
    if fanned := [case for case in cases if case.n > 1]:
        drawn.append(_fan_out(results, fanned, directory / "fan-out.png"))
    return drawn


def _lines(
    results: Results, cases: Sequence[Case], along: Callable[[Case], int], title: str, xlabel: str, path: Path
) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    for way in _ORDER:
        points = {along(case): _ms(results.values(COST, case, way, "cost_s")) for case in sorted(cases)}
        measured = {at: times for at, times in points.items() if times}
        if measured:
            plots.line(axes, measured, "o--" if way == MEMCPY else "o-", label=way, color=_COLOURS[way])
    plots.in_steps(axes, sorted(map(along, cases)), xlabel, are_bytes=xlabel == "payload")
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    return plots.write(axes, title, path, **_BESIDE)


def _bars(results: Results, case: Case, path: Path) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    ways = [way for way in _ORDER[:-1] if results.values(COST, case, way, "cost_s")]
    left = [0.0] * len(ways)
    for part in _PARTS:
        widths = [max(_median(results, case, way, part), 0.0) for way in ways]
        axes.barh(ways, widths, left=left, label=part.removesuffix("_s").replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(_median(results, case, MEMCPY, "cost_s"), color="black", linestyle="--", label="memcpy")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return plots.write(axes, f"Where it goes: {size(JUDGED)}, 1 reader", path)


def _fan_out(results: Results, cases: Sequence[Case], path: Path) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    wide = 0.8 / len(_ORDER)
    for number, way in enumerate(_ORDER):
        heights = [_median(results, case, way, "cost_s") for case in cases]
        at = [i + number * wide for i in range(len(cases))]
        axes.bar(at, heights, wide, label=way, color=_COLOURS[way])
    axes.set_xticks(
        [i + 0.4 for i in range(len(cases))], [str(case).replace(", n = ", "\nn = ") for case in cases]
    )
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    title = "The same tensor put several times, and taken each time (memcpy: once)"
    return plots.write(axes, title, path, **_BESIDE)


def _median(results: Results, case: Case, way: str, figure: str) -> float:
    return (results.median(COST, case, way, figure) or 0.0) * 1e3


def _ms(times: Sequence[float]) -> list[float]:
    return [seconds * 1e3 for seconds in times]
