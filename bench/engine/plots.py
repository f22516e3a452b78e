"""The records as one picture for each release."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from bench.engine.cases import Case
from bench.engine.records import CALLS, LATENCY, MEMORY, Measure, Results
from bench.harness.plots import pyplot
from bench.harness.tables import number

_COLOURS = {"off": "#a50f15", "backport": "#9ecae1", "lane": "#08519c"}
_BY_KEY = {measure.key: measure for measure in (*CALLS, LATENCY, *MEMORY)}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write a picture for each release that has figures; the paths."""
    return [_release(results, release, directory / f"engine-{release}.png") for release in results.groups]


def _release(results: Results, release: str, path: Path) -> Path:
    cases = results.cases(release)
    featured = [case for case in cases if case.kind != "text"]
    alone = [case for case in featured if case.concurrency == 1]
    most = {case.workload: case for case in cases}  # the last, with the most at a time
    figure, axes = pyplot.subplots(2, 2, figsize=(16, 10))
    _bars(axes[0, 0], results, release, alone, _BY_KEY["send_s"], "Tokenizer's event loop blocked")
    _bars(axes[0, 1], results, release, alone, _BY_KEY["recv1_s"], "Last rank in recv_requests")
    _bars(axes[1, 0], results, release, list(most.values()), LATENCY, "Latency, median")
    _bars(axes[1, 1], results, release, featured, _BY_KEY["shared"], "Peak of shared memory per request in flight")
    figure.suptitle(f"sglang {release} on CPU, TP 2")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axes: Axes, results: Results, release: str, cases: list[Case], measure: Measure, title: str) -> None:
    def lengths(mode: str) -> list[float]:
        return [(results.median(release, case, mode, measure.key) or 0.0) * measure.scale for case in cases]

    if not any(any(lengths(mode)) for mode in results.ways):
        axes.set_axis_off()  # a logarithmic axis needs something on it
        return
    high = 0.8 / len(results.ways)
    for place, mode in enumerate(results.ways):
        at = [row + place * high for row in range(len(cases))]
        bars = axes.barh(at, lengths(mode), high, label=mode, color=_COLOURS.get(mode))
        axes.bar_label(bars, [number(n) if n else "-" for n in lengths(mode)], fontsize="x-small", padding=2)
    axes.set_yticks([row + 0.4 - high / 2 for row in range(len(cases))], [str(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(measure.unit)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
