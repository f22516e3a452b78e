"""The results: flat records, one for each peer and case, from which tables, plots and verdicts are made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.transport.cases import MIB, ONE_WAY, Case
from bench.transport.peers import MEMCPY, Peer
from bench.transport.rounds import Round

_LEAST_FOR_MEMORY = 16 * MIB  # below, the kernel's own bookkeeping is as large as the message


@dataclass(frozen=True)
class Record:
    """One line of the results. Seconds and bytes; None is "not measured", or "not so here".

    measure: `cost` or `one-way`. status: `ok`, or `skipped` or `failed`, with a reason. median_s, min_s, max_s:
    of the cost as bench.transport defines it, or of the latency; the parts are medians too. memcpy_s: by the same
    producer in the same rounds. pipe_s: what an empty message takes. memory_x: memory_bytes over nbytes.
    """

    measure: Literal["cost", "one-way"]
    transport: str
    engine: str | None
    mode: str | None
    label: str
    nbytes: int
    readers: int
    n: int
    items: int
    status: Literal["ok", "skipped", "failed"] = "ok"
    reason: str | None = None
    rounds: int = 0
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    p99_s: float | None = None
    pipe_s: float | None = None
    cold_s: float | None = None
    memcpy_s: float | None = None
    put_s: float | None = None
    take_s: float | None = None
    first_read_extra_s: float | None = None
    free_reader_s: float | None = None
    free_producer_s: float | None = None
    memory_bytes: int | None = None
    memory_x: float | None = None
    bytes_copied: int | None = None
    threads: int = 1
    torch: str | None = None
    cores: int | None = None

    @property
    def case(self) -> Case:
        return Case(self.readers, self.nbytes, self.n, self.items)


def cost(
    peer: Peer, case: Case, uncounted: Sequence[Round], rounds: Sequence[Round], about: Mapping[str, Any]
) -> Record:
    """What the rounds of one peer and case come to; memory was looked at in those that do not count."""
    costs = [r.cost_s for r in rounds]
    looks = [r.memory_bytes for r in uncounted if r.memory_bytes is not None]
    held = max(looks) if looks and case.nbytes >= _LEAST_FOR_MEMORY else None
    parts = ("memcpy_s", "put_s", "take_s", "first_read_extra_s", "free_reader_s", "free_producer_s")
    return Record(
        **_identity("cost", peer, case),
        rounds=len(rounds),
        median_s=statistics.median(costs),
        min_s=min(costs),
        max_s=max(costs),
        cold_s=uncounted[0].cost_s,
        memory_bytes=held,
        memory_x=held / case.nbytes if held is not None else None,
        bytes_copied=peer.copied(case),
        **{part: statistics.median(getattr(r, part) for r in rounds) for part in parts},
        **about,
    )


def memcpy(case: Case, rounds: Sequence[Round], about: Mapping[str, Any]) -> Record:
    """The plain copy, over all peers' rounds of one case."""
    times = [r.memcpy_s for r in rounds]
    return Record(
        **_identity("cost", Peer(MEMCPY, ""), case),
        rounds=len(times),
        median_s=statistics.median(times),
        min_s=min(times),
        max_s=max(times),
        memcpy_s=statistics.median(times),
        bytes_copied=case.nbytes,
        **about,
    )


def one_way(peer: Peer, times: Sequence[float], bare: Sequence[float], about: Mapping[str, Any]) -> Record:
    """Latencies of single messages, and of empty ones on the same pipe."""
    return Record(
        **_identity("one-way", peer, Case(1, ONE_WAY)),
        rounds=len(times),
        median_s=statistics.median(times),
        min_s=min(times),
        max_s=max(times),
        p99_s=statistics.quantiles(times, n=100)[-1],
        pipe_s=statistics.median(bare),
        **about,
    )


def absent(
    measure: Literal["cost", "one-way"],
    peer: Peer,
    case: Case,
    status: Literal["skipped", "failed"],
    reason: str,
    about: Mapping[str, Any],
) -> Record:
    """A peer and case without figures, and why."""
    return Record(**_identity(measure, peer, case), status=status, reason=reason, **about)


def _identity(measure: str, peer: Peer, case: Case) -> dict[str, Any]:
    return {
        "measure": measure,
        "transport": peer.transport,
        "engine": peer.engine,
        "mode": peer.mode,
        "label": peer.label,
        **asdict(case),
    }


def find(records: Iterable[Record], label: str, case: Case, measure: str = "cost") -> Record | None:
    """The record of one peer and case, if it has figures."""
    for record in records:
        if (record.measure, record.label, record.case, record.status) == (measure, label, case, "ok"):
            return record
    return None


def save(records: Iterable[Record], path: Path) -> None:
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")


def load(path: Path) -> list[Record]:
    return [Record(**record) for record in json.loads(path.read_text())]
