"""The results: for each measure, case and way the figures of each round; goals and ratios are computed from them.

Of a record's figures the first is what is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu.ways import LANE_PINNED, PAGEABLE, POOL, POOL_AS_IT_COMES, SEGMENT, TORCH_PINNED
from bench.harness import goals as wanted
from bench.harness import results
from bench.harness.goals import Goal
from bench.harness.ratios import Spread, extremes
from bench.harness.results import Record
from bench.harness.sizes import JUDGED, size

REHEARSAL = "rehearsal, not a measurement"
COPY = "pageable copy"
COMPARED = {  # with what the others are
    "contexts": (POOL_AS_IT_COMES,),
    "h2d": (TORCH_PINNED, PAGEABLE),
    "concurrent": (SEGMENT, TORCH_PINNED),
    "registration": (COPY,),
    "first byte": (POOL, SEGMENT),
}


@dataclass
class Results(results.Results[str]):
    """`note` says so where it is a rehearsal."""

    note: str = ""

    def compared(self, measure: str, case: str, way: str) -> Sequence[float]:
        for record in self.of(measure, case, way):
            return next(iter(record.figures.values()), ())
        return ()

    def ratio(self, record: Record[str], peer: str) -> float | None:
        """A record's median over that of a peer in the same case; None in a rehearsal."""
        ours, theirs = (self.compared(record.group, record.case, way) for way in (record.way, peer))
        if self.note or not (ours and theirs):
            return None
        return wanted.over(statistics.median(ours), statistics.median(theirs))


def goals(results: Results) -> list[Goal]:
    """What is wanted of the pinned zone; without figures in a rehearsal."""
    pinned = results.of("h2d", size(JUDGED), LANE_PINNED)
    what = f"{size(JUDGED)} to the device, {LANE_PINNED} over"

    def over(peer: str) -> float | None:
        return results.ratio(pinned[0], peer) if pinned else None

    return [
        Goal(f"{what} {TORCH_PINNED}, the peak", 0.9, over(TORCH_PINNED), at_least=True),
        Goal(f"{what} {PAGEABLE}", 2.0, over(PAGEABLE), at_least=True),
    ]


def ratios(results: Results) -> dict[str, Spread | None]:
    """The pinned lane over what it is compared with, in each case, on this GPU; spread over rounds."""
    gpu = results.machine["gpus"][0]["name"]
    found: dict[str, Spread | None] = {}
    for measure, peers in COMPARED.items():
        for case in results.cases(measure):
            for peer in peers:
                ours, theirs = (results.compared(measure, case, way) for way in (LANE_PINNED, peer))
                if ours and theirs:
                    what = next(iter(results.of(measure, case, LANE_PINNED)[0].figures))
                    name = f"{gpu}, {measure}, {case}: {what}, {LANE_PINNED} over {peer}"
                    found[name] = extremes(ours).over(extremes(theirs))
    return found
