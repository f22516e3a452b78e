"""The lanes of this process in the engine's own /metrics, when that runs with --enable-metrics.

The engine collects from all of its processes through files (prometheus_client's multiprocess mode), so numbers are
written here as they are, once a second; nothing can be asked for at the moment of a scrape.

Imported when the tokenizer manager or the scheduler is there: the engine has set PROMETHEUS_MULTIPROC_DIR by then,
and has itself imported prometheus_client, which looks for that variable once. A rank counts failures only.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from mmlane import __version__, settings
from mmlane.lane import Lane
from mmlane.lane.status import LaneStats
from mmlane_patches import guard

PERIOD_S = 1.0

# How a tokenizer's lane is. off: this launch has none, or it was switched off; unused: no large feature has been
# sent yet; opening: not all ranks have joined; failed: it could not be made, or has ended.
State = Literal["off", "unused", "opening", "open", "failed"]
STATES: tuple[State, ...] = get_args(State)

# Of our own, so that an import that fails halfway leaves nothing in the way of the next. The engine reads files.
REGISTRY = CollectorRegistry()
MODE: Final = "livesum"  # of several tokenizer workers, those that live
INFO = Gauge(
    "mmlane_info",
    "Version and mode of mmlane, always 1",
    ["version", "mode"],
    multiprocess_mode="livemax",
    registry=REGISTRY,
)
LANES = Gauge(
    "mmlane_lanes",
    "Tokenizer processes, by the state of their lane",
    ["state"],
    multiprocess_mode=MODE,
    registry=REGISTRY,
)
BYTES = Gauge(
    "mmlane_lane_bytes",
    "Bytes: capacity, committed, pinned, used",
    ["kind"],
    multiprocess_mode=MODE,
    registry=REGISTRY,
)
READERS = Gauge(
    "mmlane_lane_readers", "Ranks: joined, expected", ["kind"], multiprocess_mode=MODE, registry=REGISTRY
)
EXTENTS = Gauge("mmlane_lane_extents", "Tensors in the lane", multiprocess_mode=MODE, registry=REGISTRY)
TICKETS = Gauge(
    "mmlane_lane_tickets", "Tickets that have not been released yet", multiprocess_mode=MODE, registry=REGISTRY
)
FAILURES = Counter("mmlane_failures", "Failures of mmlane itself, by where", ["where"], registry=REGISTRY)
FALLBACKS = Counter("mmlane_fallbacks", "Features that went another way, by cause", ["cause"], registry=REGISTRY)
TOTALS = {
    "puts": Counter("mmlane_puts", "Tickets issued", registry=REGISTRY),
    "shared": Counter(
        "mmlane_shared_puts", "Tickets issued for bytes that were in the lane already", registry=REGISTRY
    ),
    "copied_bytes": Counter("mmlane_copied_bytes", "Bytes copied into the lane", registry=REGISTRY),
    "copy_seconds": Counter("mmlane_copy_seconds", "Seconds spent copying into the lane", registry=REGISTRY),
    "lost_tickets": Counter(
        "mmlane_lost_tickets", "Tickets reclaimed because at least one rank never saw them", registry=REGISTRY
    ),
}

guard.count_with(lambda where, count: FAILURES.labels(where).inc(count))

_tokenizers: weakref.WeakKeyDictionary[Any, Callable[[], State]] = weakref.WeakKeyDictionary()
_watched: dict[Lane, defaultdict[str, float]] = {}  # with what has been counted of each
_writing = threading.Lock()
_writer: threading.Thread | None = None


def begin(tokenizer: Any, state: Callable[[], State]) -> None:
    """Add a tokenizer to the numbers of this process, until it is let go. `state` does not hold it."""
    INFO.labels(__version__, settings.read(os.environ).mode).set(1)
    _tokenizers[tokenizer] = state
    write()
    _go_on_writing()


def watch(lane: Lane) -> None:
    """Add a lane to the numbers of this process, until it is closed."""
    with _writing:
        _watched[lane] = defaultdict(float)
    write()
    _go_on_writing()


def write() -> None:
    """Write down how things are now. A failure is counted, and the rest written next time; nothing is raised."""
    with _writing:
        closed = [lane for lane in _watched if lane.is_closed]
        try:
            _write()
        except Exception as error:  # noqa: BLE001 - a full disk, or anything in somebody else's library
            guard.failed("metrics", error, "numbers in /metrics may be old; it goes on trying")
        for lane in closed:  # whose last numbers have been written, if that could be done
            del _watched[lane]


def _write() -> None:
    states = Count(state() for state in list(_tokenizers.values()))
    for state in STATES:
        LANES.labels(state).set(states[state])
    found = [_counted(lane, said) for lane, said in _watched.items()]
    BYTES.labels("capacity").set(sum(stats.capacity_bytes for stats in found))
    BYTES.labels("committed").set(sum(stats.committed_bytes for stats in found))
    BYTES.labels("pinned").set(sum(stats.pinned_bytes for stats in found))
    BYTES.labels("used").set(sum(stats.used_bytes for stats in found))
    READERS.labels("joined").set(sum(len(numbers) for stats in found for numbers in stats.joined.values()))
    READERS.labels("expected").set(sum(sum(stats.expected.values()) for stats in found))
    EXTENTS.set(sum(stats.extents for stats in found))
    TICKETS.set(sum(stats.tickets for stats in found))


def _counted(lane: Lane, said: MutableMapping[str, float]) -> LaneStats:
    """A lane's numbers, those that only grow written down."""
    stats = lane.stats()
    for name, total in TOTALS.items():
        _add(total, said, name, getattr(stats, name))
    for cause, count in stats.fallbacks.items():
        _add(FALLBACKS.labels(cause), said, cause, count)
    return stats


def _add(total: Counter, said: MutableMapping[str, float], name: str, count: float) -> None:
    """Have a total grow by what is new; in memory it has grown also where it cannot be written."""
    new, said[name] = count - said[name], count
    total.inc(new)


def _go_on_writing() -> None:
    """Have a thread write the numbers once a period: one, for as long as there are any."""
    global _writer
    with _writing:
        if _writer is None or not _writer.is_alive():
            writer = threading.Thread(target=_keep_writing, name="mmlane-metrics", daemon=True)
            writer.start()
            _writer = writer


def _keep_writing() -> None:
    global _writer
    pause = threading.Event()
    while True:
        pause.wait(PERIOD_S)
        write()
        with _writing:
            if not _watched and not _tokenizers:
                _writer = None
                return
