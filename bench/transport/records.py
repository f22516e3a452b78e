"""The results: for each measure, `cost` or `one-way`, case and way the figures of each round, as bench.transport
defines them. Seconds and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.harness import results
from bench.harness.results import Record
from bench.harness.sizes import MIB
from bench.transport.ways import MEMCPY, Way
from mmlane.bench.case import Case
from mmlane.bench.rounds import Round

COST, ONE_WAY = "cost", "one-way"
_LEAST_FOR_MEMORY = 16 * MIB  # below, the kernel's own bookkeeping is as large as the message


class Results(results.Results[Case]):
    @staticmethod
    def case_of(found: Any) -> Case:
        return Case(**found)


def cost(way: Way, case: Case, uncounted: Sequence[Round], rounds: Sequence[Round]) -> Record[Case]:
    """What the rounds of one way and case come to; memory was looked at in those that do not count."""
    figures: dict[str, list[float]] = {"cold_s": [uncounted[0].cost_s]}
    for each in map(asdict, rounds):
        for name, value in each.items():
            if value is not None:
                figures.setdefault(name, []).append(value)
    if case.nbytes >= _LEAST_FOR_MEMORY:
        figures["memory_bytes"] = [max(r.memory_bytes for r in uncounted if r.memory_bytes is not None)]
    if (copied := way.copied(case)) is not None:
        figures["copied_bytes"] = [copied]
    return Record(COST, case, way.label, figures=figures)


def memcpy(case: Case, rounds: Sequence[Round]) -> Record[Case]:
    """The plain copy, over all ways' rounds of one case."""
    times = [r.memcpy_s for r in rounds]
    figures = {"cost_s": times, "memcpy_s": times, "copied_bytes": [float(case.nbytes)]}
    return Record(COST, case, MEMCPY, figures=figures)
