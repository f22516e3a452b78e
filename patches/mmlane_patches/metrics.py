"""The lanes of this process in the engine's own /metrics, when that runs with --enable-metrics.

The engine collects from all of its processes through files (prometheus_client's multiprocess mode), so numbers are
written here as they are, once a second; nothing can be asked for at the moment of a scrape.

Imported when the first lane is there, which is after the engine has set PROMETHEUS_MULTIPROC_DIR.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from prometheus_client import Counter, Gauge

from mmlane.lane import Lane
from mmlane.lane.status import LaneStats

PERIOD_S = 1.0

MODE: Final = "livesum"  # of several tokenizer workers, those that live
BYTES = Gauge("mmlane_lane_bytes", "Bytes: capacity, committed, pinned, used", ["kind"], multiprocess_mode=MODE)
READERS = Gauge("mmlane_lane_readers", "Ranks: joined, expected", ["kind"], multiprocess_mode=MODE)
EXTENTS = Gauge("mmlane_lane_extents", "Tensors in the lane", multiprocess_mode=MODE)
TICKETS = Gauge("mmlane_lane_tickets", "Tickets that have not come back yet", multiprocess_mode=MODE)
FALLBACKS = Counter("mmlane_fallbacks", "Features that went another way, by cause", ["cause"])
TOTALS = {
    "puts": Counter("mmlane_puts", "Tickets issued"),
    "shared": Counter("mmlane_shared_puts", "Tickets issued for bytes that were in the lane already"),
    "copied": Counter("mmlane_copied_bytes", "Bytes copied into the lane"),
    "copy_seconds": Counter("mmlane_copy_seconds", "Seconds spent copying into the lane"),
    "orphans": Counter("mmlane_orphans", "Tickets reclaimed because at least one rank never saw them"),
}

_watched: dict[Lane, defaultdict[str, float]] = {}  # with what has been counted of each
_writing = threading.Lock()


def watch(lane: Lane) -> None:
    """Add a lane to the numbers of this process, until it is closed."""
    with _writing:
        first = not _watched
        _watched[lane] = defaultdict(float)
    write()
    if first:
        threading.Thread(target=_keep_writing, name="mmlane-metrics", daemon=True).start()


def write() -> None:
    """Write down how the lanes are now."""
    with _writing:
        found = [_counted(lane) for lane in list(_watched)]
        BYTES.labels("capacity").set(sum(stats.capacity for stats in found))
        BYTES.labels("committed").set(sum(stats.warm for stats in found))
        BYTES.labels("pinned").set(sum(stats.pinned for stats in found))
        BYTES.labels("used").set(sum(stats.taken for stats in found))
        READERS.labels("joined").set(sum(sum(stats.readers.values()) for stats in found))
        READERS.labels("expected").set(sum(sum(stats.expected.values()) for stats in found))
        EXTENTS.set(sum(stats.extents for stats in found))
        TICKETS.set(sum(stats.tickets for stats in found))


def _counted(lane: Lane) -> LaneStats:
    """A lane's numbers, those that only grow written down, and the lane let go once it is closed."""
    stats, said = lane.stats(), _watched[lane]
    for name, total in TOTALS.items():
        total.inc(getattr(stats, name) - said[name])
        said[name] = getattr(stats, name)
    for cause, count in stats.refused.items():
        FALLBACKS.labels(cause).inc(count - said[cause])
        said[cause] = count
    if lane.is_closed:
        del _watched[lane]
    return stats


def _keep_writing() -> None:
    pause = threading.Event()
    while _watched:
        pause.wait(PERIOD_S)
        write()
