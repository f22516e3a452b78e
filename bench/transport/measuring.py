"""Goes through the cases: every peer has its turn in every round."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.transport import memory, records
from bench.transport.cases import GIB, MIB, ONE_WAY, Case, size
from bench.transport.group import Failed, Group, Refusal, shared_memory_room
from bench.transport.peers import Peer
from bench.transport.records import Record
from bench.transport.rounds import Round

_SMALL = 4 * MIB  # up to here a round takes next to no time, and varies more
_MORE_ROUNDS = 4
_ENOUGH_S = 4.0  # a peer that has spent so long on a case needs no more rounds
_FEWEST = 3
_SLOW_S = 2.0  # so slow is nobody who would be faster when warm
_SPARE = GIB
_TURNS = 4

Say = Callable[[str], None]


class Measuring:
    """`rounds`: how many count, for each peer and case."""

    def __init__(self, groups: Sequence[Group], *, rounds: int, threads: int, say: Say) -> None:
        self._groups = groups
        self._rounds = rounds
        self._about: dict[str, Any] = {"threads": threads, "cores": len(os.sched_getaffinity(0))}
        self._say = say

    def start(self) -> None:
        """Start all peers at once: an engine takes 15 s. One that fails is tried again by each case."""
        for group in self._groups:
            group.launch()
        for group in self._groups:
            try:
                group.wait()
            except Failed as problem:
                self._say(f"{group.peer.label}: {problem}")

    def cost(self, case: Case) -> Iterator[Record]:
        """One record for each peer, and one for the plain copy."""
        began = time.monotonic()
        rounds = self._rounds * (_MORE_ROUNDS if case.nbytes <= _SMALL else 1)
        # All peers keep their payloads through the case, unless that is too much at once; then each makes its own
        # anew for each turn, which takes long, so that turns are fewer, and of two rounds.
        park = 2 * case.nbytes * len(self._groups) > memory.available() // 4
        turns, in_turn = (rounds, 1) if not park else (_FEWEST // 2 + 1, 2)
        uncounted: dict[Group, list[Round]] = {}
        found: dict[Group, list[Round]] = {}
        spent = dict.fromkeys(self._groups, 0.0)
        for group in self._groups:
            try:
                _check_room(group.peer, case)
                self._begin(group, case)
                uncounted[group] = _turn(group, 1, look=True, park=park)
                if uncounted[group][0].cost_s < _SLOW_S:
                    uncounted[group] += _turn(group, 1, look=True, park=park)
            except (Failed, Refusal) as problem:
                yield self._absent("cost", group, case, problem)
                continue
            found[group] = []
        for _ in range(turns):
            for group in list(found):
                if spent[group] > _ENOUGH_S and len(found[group]) >= _FEWEST:
                    continue
                before = time.monotonic()
                try:
                    found[group] += _turn(group, in_turn, look=False, park=park)
                except (Failed, Refusal) as problem:
                    del found[group]
                    yield self._absent("cost", group, case, problem)
                spent[group] += time.monotonic() - before
        for group, measured in list(found.items()):
            try:
                group.order("end")
            except (Failed, Refusal) as problem:
                yield self._absent("cost", group, case, problem)
                continue
            yield records.cost(group.peer, case, uncounted[group], measured, self._about | {"torch": group.torch})
        if everyone := [one for measured in found.values() for one in measured]:
            yield records.memcpy(case, everyone, self._about)
        self._say(f"{case}: {time.monotonic() - began:.0f} s")

    def one_way(self, count: int) -> Iterator[Record]:
        """Latency of `count` messages of each peer, a part of them in each of several turns."""
        case = Case(1, ONE_WAY)
        times: dict[Group, tuple[list[float], list[float]]] = {}
        for group in self._groups:
            try:
                self._begin(group, case)
            except (Failed, Refusal) as problem:
                yield self._absent("one-way", group, case, problem)
                continue
            times[group] = ([], [])
        for _ in range(_TURNS):
            for group in list(times):
                try:
                    for kept, more in zip(
                        times[group], group.order("one_way", count=-(-count // _TURNS)), strict=True
                    ):
                        kept += more
                except (Failed, Refusal) as problem:
                    del times[group]
                    yield self._absent("one-way", group, case, problem)
        for group, (measured, bare) in times.items():
            group.order("end")
            yield records.one_way(group.peer, measured, bare, self._about | {"torch": group.torch})
        self._say(f"one-way latency, {size(ONE_WAY)}: done")

    def _begin(self, group: Group, case: Case) -> None:
        if not group.running:
            group.launch()
            group.wait()
        group.order("begin", case=case)

    def _absent(self, measure: Any, group: Group, case: Case, problem: Failed | Refusal) -> Record:
        status: Any = "skipped" if isinstance(problem, Refusal) else "failed"
        self._say(f"{group.peer.label}, {case}: {status}, {str(problem).splitlines()[0]}")
        return records.absent(measure, group.peer, case, status, str(problem), self._about)


def _turn(group: Group, rounds: int, *, look: bool, park: bool) -> list[Round]:
    return [group.order("round", look=look, park=park and number == rounds - 1) for number in range(rounds)]


def _check_room(peer: Peer, case: Case) -> None:
    """Raises Refusal."""
    needs = peer.needs(case)
    lacking = 2 * case.nbytes + needs + _SPARE - memory.available()
    if lacking > 0:
        raise Refusal(f"would need {lacking / MIB:.0f} MiB more memory than there is")
    if peer.transport != "lane" and needs > shared_memory_room():
        raise Refusal(f"/dev/shm is too small for {needs / MIB:.0f} MiB")
