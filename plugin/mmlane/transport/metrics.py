"""The lanes of this process in the engine's own /metrics, when that runs with --enable-metrics.

The engine collects from all of its processes through files (prometheus_client's multiprocess mode), so numbers are
written here as they are, once a second; nothing can be asked for at the moment of a scrape.

Imported when the tokenizer manager or the scheduler is there: the engine has set PROMETHEUS_MULTIPROC_DIR by then,
and has itself imported prometheus_client, which looks for that variable once. A rank counts failures and what it
exchanges with other nodes.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from mmlane import __version__, log
from mmlane.lane import Lane
from mmlane.lane.status import FORMER, Former, LaneStats
from mmlane.transport.lane import STATES, State

PERIOD_S = 1.0

# Of our own, so that an import that fails halfway leaves nothing in the way of the next. The engine reads files.
REGISTRY = CollectorRegistry()
LIVE_SUM: Final = "livesum"  # of several tokenizer workers, those that live
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
    multiprocess_mode=LIVE_SUM,
    registry=REGISTRY,
)
FAILURES = Counter("mmlane_failures", "Failures of mmlane itself, by where", ["where"], registry=REGISTRY)
NODE_BYTES = Counter(
    "mmlane_node_bytes", "Bytes of features between nodes, by direction", ["direction"], registry=REGISTRY
)
FALLBACKS = Counter("mmlane_fallbacks", "Features that went another way, by cause", ["cause"], registry=REGISTRY)
# By the figure's name in LaneStats, of which the metric's is made.
GAUGES = {
    name: Gauge(f"mmlane_{name}", text, multiprocess_mode=LIVE_SUM, registry=REGISTRY)
    for name, text in (
        ("capacity_bytes", "Address room of the lane"),
        ("committed_bytes", "Memory that is committed"),
        ("pinned_bytes", "Memory that stays committed for ranks to pin"),
        ("used_bytes", "Memory in extents"),
        ("extents", "Tensors in the lane"),
        ("tickets", "Tickets that have not been released yet"),
        ("expected_readers", "Ranks that have to join"),
        ("joined_readers", "Ranks that have joined"),
    )
}
TOTALS = {
    name: Counter(f"mmlane_{name}", text, registry=REGISTRY)
    for name, text in (
        ("puts", "Tickets issued"),
        ("shared_puts", "Tickets issued for bytes that were in the lane already"),
        ("copied_bytes", "Bytes copied into the lane"),
        ("copy_seconds", "Seconds spent copying into the lane"),
        ("lost_tickets", "Tickets reclaimed because at least one rank never saw them"),
        ("malformed_messages", "Messages of ranks that made no sense"),
        ("rejected_peers", "Processes that were not let into the lane"),
    )
}


def _former() -> dict[str, Gauge]:
    """Metrics by their former names, which stay until those in `FORMER` go."""
    found: dict[str, Gauge] = {}
    for now, (_, name, kind) in FORMER.items():
        if name and name not in found:
            text = f"Deprecated: mmlane_{now}" + (" and the others of that ending" if kind else "")
            labels = ["kind"] if kind else []
            found[name] = Gauge(name, text, labels, multiprocess_mode=LIVE_SUM, registry=REGISTRY)
    return found


FORMER_GAUGES = _former()

log.count_with(lambda where, count: FAILURES.labels(where).inc(count))


def count_node_bytes(direction: str, count: int) -> None:
    """Add to what this rank has "sent" to another node, or "received" from one."""
    NODE_BYTES.labels(direction).inc(count)


_meters: set[Meter] = set()
_writing = threading.Lock()
_writer: threading.Thread | None = None


class Meter:
    """What one tokenizer adds to the numbers of its process, until it has been let go and its lane is closed."""

    def __init__(self, tokenizer: object) -> None:
        self.state: Callable[[], State] = _off
        self.lanes: dict[Lane, defaultdict[str, float]] = {}  # with what has been counted of each
        self.is_over = False
        weakref.finalize(tokenizer, self._end).atexit = False

    def begin(self, state: Callable[[], State], mode: str) -> None:
        """Add the tokenizer to the numbers. `state` does not hold it. mode: that of mmlane in this process."""
        self.state = state
        INFO.labels(__version__, mode).set(1)
        self._publish()

    def watch(self, lane: Lane) -> None:
        """Add a lane to the numbers, until it is closed."""
        with _writing:
            self.lanes[lane] = defaultdict(float)
        self._publish()

    def _end(self) -> None:  # a finalizer: takes no lock
        self.is_over = True
        self.state = _off  # and with the other goes what it holds, such as the producer

    def _publish(self) -> None:
        with _writing:
            _meters.add(self)
        write()
        _ensure_writer()


def _off() -> State:
    return "off"


def write() -> None:
    """Write down how things are now. A failure is counted, and the rest written next time; nothing is raised."""
    with _writing:
        closed = [(meter, lane) for meter in _meters for lane in meter.lanes if lane.is_closed]
        over = [meter for meter in _meters if meter.is_over]
        try:
            _write()
        except Exception as error:  # noqa: BLE001 - a full disk, or an error in another library
            log.failed("metrics", error, "numbers in /metrics may be old; it goes on trying")
        for meter, lane in closed:  # whose last numbers have been written, if that could be done
            del meter.lanes[lane]
        _meters.difference_update([meter for meter in over if not meter.lanes])


def _write() -> None:
    states = Count(meter.state() for meter in _meters if not meter.is_over)
    for state in STATES:
        LANES.labels(state).set(states[state])
    found = [_counted(lane, so_far) for meter in _meters for lane, so_far in meter.lanes.items()]
    for name, gauge in GAUGES.items():
        value = sum(_number(getattr(stats, name)) for stats in found)
        gauge.set(value)
        _, former, kind = FORMER.get(name, Former())
        if former:
            (FORMER_GAUGES[former].labels(kind) if kind else FORMER_GAUGES[former]).set(value)


def _number(figure: int | dict[str, int] | dict[str, list[int]]) -> int:
    """A figure as one number: of readers by group, how many there are."""
    if isinstance(figure, int):
        return figure
    return sum(one if isinstance(one, int) else len(one) for one in figure.values())


def _counted(lane: Lane, so_far: MutableMapping[str, float]) -> LaneStats:
    """A lane's numbers, those that only grow written down."""
    stats = lane.stats()
    for name, total in TOTALS.items():
        _add(total, so_far, name, getattr(stats, name))
    for cause, count in stats.fallbacks.items():
        _add(FALLBACKS.labels(cause), so_far, cause, count)
    return stats


def _add(total: Counter, so_far: MutableMapping[str, float], name: str, count: float) -> None:
    """Have a total grow by what is new; in memory it has grown also where it cannot be written."""
    new, so_far[name] = count - so_far[name], count
    total.inc(new)


def _ensure_writer() -> None:
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
            if not _meters:
                _writer = None
                return
