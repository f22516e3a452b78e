"""The records as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.transport.cases import JUDGED, Case, size
from bench.transport.peers import MEMCPY, PEERS
from bench.transport.records import Record, find

_ORDER = [*(peer.label for peer in PEERS), MEMCPY]
_HUES = ("#08519c", "#4292c6", "#9ecae1", "#fcbba1", "#fb6a4a", "#a50f15", "#807dba", "#41ab5d", "black")
_COLOURS = dict(zip(_ORDER, _HUES, strict=True))  # of one family what is of one kind
_PARTS = ("put_s", "take_s", "first_read_extra_s", "free_reader_s", "free_producer_s")


def draw(records: Sequence[Record], directory: Path) -> list[Path]:
    """Write what the records have figures for; the paths."""
    costs = [r for r in records if r.measure == "cost" and r.status == "ok"]
    plain = [r for r in costs if r.n == 1 and r.items == 1]
    drawn = []
    for readers in sorted({r.readers for r in plain}):
        chosen = [r for r in plain if r.readers == readers]
        if len({r.nbytes for r in chosen}) > 1:
            title = f"Cost of a message, {readers} reader{'s' * (readers > 1)}"
            drawn.append(_lines(chosen, lambda r: r.nbytes, title, "bytes", directory / f"size-{readers}.png"))
    for nbytes in sorted({r.nbytes for r in plain}):
        chosen = [r for r in plain if r.nbytes == nbytes]
        if len({r.readers for r in chosen}) > 2:
            title = f"Cost of a message of {size(nbytes)}"
            name = f"readers-{size(nbytes).replace(' ', '')}.png"
            drawn.append(_lines(chosen, lambda r: r.readers, title, "readers", directory / name))
    if parts := [r for r in (find(costs, label, Case(1, JUDGED)) for label in _ORDER[:-1]) if r is not None]:
        drawn.append(_bars(parts, directory / "parts.png"))
    fanned = sorted({r.case for r in costs if r.n > 1})
    if fanned:
        drawn.append(_fan_out(costs, fanned, directory / "fan-out.png"))
    return drawn


def _lines(records: Iterable[Record], along: Callable[[Record], int], title: str, xlabel: str, path: Path) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    chosen = list(records)
    for label in _ORDER:
        ours = sorted((r for r in chosen if r.label == label), key=along)
        if ours:
            at, medians = [along(r) for r in ours], [_ms(r.median_s) for r in ours]
            below = [_ms(r.median_s) - _ms(r.min_s) for r in ours]
            above = [_ms(r.max_s) - _ms(r.median_s) for r in ours]
            style = "o--" if label == MEMCPY else "o-"
            axes.errorbar(
                at, medians, yerr=[below, above], fmt=style, capsize=3, label=label, color=_COLOURS[label]
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({along(r) for r in chosen})
    axes.set_xticks(ticks, [size(t) if xlabel == "bytes" else str(t) for t in ticks])
    axes.set_xlabel("payload" if xlabel == "bytes" else xlabel)
    return _finish(axes, title, path)


def _bars(records: Sequence[Record], path: Path) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    labels = [r.label for r in records]
    left = [0.0] * len(records)
    for part in _PARTS:
        widths = [max(_ms(getattr(r, part)), 0.0) for r in records]
        axes.barh(labels, widths, left=left, label=part.removesuffix("_s").replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(_ms(records[0].memcpy_s), color="black", linestyle="--", label="memcpy")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(f"Where it goes: {size(JUDGED)}, 1 reader")
    axes.legend()
    return _write(path)


def _fan_out(records: Sequence[Record], cases: Sequence[Case], path: Path) -> Path:
    _, axes = pyplot.subplots(figsize=(8, 5))
    wide = 0.8 / len(_ORDER)
    for number, label in enumerate(_ORDER):
        found = [find(records, label, case) for case in cases]
        heights = [_ms(r.median_s) if r is not None else 0.0 for r in found]
        at = [i + number * wide for i in range(len(cases))]
        axes.bar(at, heights, wide, label=label, color=_COLOURS[label])
    axes.set_xticks(
        [i + 0.4 for i in range(len(cases))], [str(case).replace(", n = ", "\nn = ") for case in cases]
    )
    axes.set_yscale("log")
    return _finish(axes, "The same tensor put several times, and taken each time (memcpy: once)", path)


def _ms(seconds: float | None) -> float:
    return (seconds or 0.0) * 1e3


def _finish(axes: Axes, title: str, path: Path) -> Path:
    axes.set_ylabel("ms")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _write(path)


def _write(path: Path) -> Path:
    pyplot.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close()
    return path
