"""The ways of a tensor that `mmlane bench` compares."""

from __future__ import annotations

from dataclasses import dataclass

from mmlane.bench.case import Case

MEMCPY = "memcpy"  # measured by every way, in each of its turns


@dataclass(frozen=True)
class Way:
    """module: where its two ends are. mode: theirs. mmlane: what `MMLANE` says in its processes."""

    id: str
    label: str
    module: str
    mode: str | None = None
    mmlane: str = "off"
    device: str = "cpu"

    @property
    def has_engine(self) -> bool:
        return self.module in ("mmlane.bench.via_engine", "mmlane.bench.via_plugin")

    @property
    def has_lane(self) -> bool:
        return "lane" in self.id

    def carries(self, case: Case) -> int:
        """Bytes at most, while one message is on its way, beside the payload and what a lane keeps."""
        if self.has_lane:
            return self.segments(case)
        if self.id != "engine":
            return case.n * case.nbytes
        # Up to 0.5.20 every reader clones, on 0.5.9 the first one sends them to the others, by pickle.
        return (case.n * (1 + case.readers) + 4 * case.readers) * case.nbytes

    def segments(self, case: Case) -> int:
        """Bytes at most in /dev/shm. A lane of an engine opens with what goes by segments."""
        if self.has_lane and not self.has_engine:
            return 0
        return case.n * case.nbytes

    def keeps(self, nbytes: int) -> int:
        """Bytes that stay, at most, once the largest payload was carried."""
        return nbytes if self.has_lane else 0


ENGINE = Way("engine", "engine as installed", "mmlane.bench.via_engine")
BACKPORT = Way("backport", "engine, back-ports", "mmlane.bench.via_plugin", mode="backport", mmlane="backport")
LANE = Way("lane", "engine, lane", "mmlane.bench.via_plugin", mode="lane", mmlane="lane")
ALONE = Way("lane-alone", "lane, without engine", "mmlane.bench.via_lane")


def on_cpu(*, engine: bool) -> list[Way]:
    """The ways to another process; `engine`: there is one to be compared."""
    return [ENGINE, BACKPORT, LANE, ALONE] if engine else [ALONE]


def on_device(device: str) -> list[Way]:
    """The ways to a GPU of another process."""
    return [
        Way("segment-device", "segment, pageable", "mmlane.bench.via_segment", mode=device, device=device),
        Way("lane-device", "lane, pinned", "mmlane.bench.via_lane", mode=device, device=device),
    ]
