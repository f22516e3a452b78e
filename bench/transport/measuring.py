"""Goes through the cases: every way has its turn in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from bench.harness.memory import available
from bench.harness.results import Record, absent
from bench.harness.sizes import GIB, MIB, size
from bench.harness.workers import Failed, Refusal
from bench.transport import records
from bench.transport.cases import ONE_WAY, Case
from bench.transport.records import Round
from bench.transport.team import Team, shared_memory_room
from bench.transport.ways import Way

_SMALL = 4 * MIB  # up to here a round takes next to no time, and varies more
_MORE_ROUNDS = 4
_ENOUGH_S = 4.0  # a way that has spent so long on a case needs no more rounds
_FEWEST = 3
_SLOW_S = 2.0  # so slow is nobody who would be faster when warm
_SPARE = GIB
_TURNS = 4


class Measuring:
    """`rounds`: how many count, for each way and case."""

    def __init__(self, teams: Sequence[Team], *, rounds: int, say: Callable[[str], None]) -> None:
        self._teams = teams
        self._rounds = rounds
        self._say = say

    def start(self) -> None:
        """Start all teams at once: an engine takes 15 s. One that fails is tried again by each case."""
        for team in self._teams:
            team.launch()
        for team in self._teams:
            try:
                team.wait()
            except Failed as problem:
                self._say(f"{team.way.label}: {problem}")

    def cost(self, case: Case) -> Iterator[Record[Case]]:
        """One record for each way, and one for the plain copy."""
        began = time.monotonic()
        rounds = self._rounds * (_MORE_ROUNDS if case.nbytes <= _SMALL else 1)
        # All teams keep their payloads through the case, unless that is too much at once; then each makes its own
        # anew for each turn, which takes long, so that turns are fewer, and of two rounds.
        park = 2 * case.nbytes * len(self._teams) > available() // 4
        turns, in_turn = (rounds, 1) if not park else (_FEWEST // 2 + 1, 2)
        uncounted: dict[Team, list[Round]] = {}
        found: dict[Team, list[Round]] = {}
        spent = dict.fromkeys(self._teams, 0.0)
        for team in self._teams:
            try:
                _check_room(team.way, case)
                self._begin(team, case)
                uncounted[team] = _turn(team, 1, look=True, park=park)
                if uncounted[team][0].cost_s < _SLOW_S:
                    uncounted[team] += _turn(team, 1, look=True, park=park)
            except (Failed, Refusal) as problem:
                yield self._absent(records.COST, team, case, problem)
                continue
            found[team] = []
        for _ in range(turns):
            for team in list(found):
                if spent[team] > _ENOUGH_S and len(found[team]) >= _FEWEST:
                    continue
                before = time.monotonic()
                try:
                    found[team] += _turn(team, in_turn, look=False, park=park)
                except (Failed, Refusal) as problem:
                    del found[team]
                    yield self._absent(records.COST, team, case, problem)
                spent[team] += time.monotonic() - before
        for team, measured in list(found.items()):
            try:
                team.call("end")
            except (Failed, Refusal) as problem:
                yield self._absent(records.COST, team, case, problem)
                continue
            yield records.cost(team.way, case, uncounted[team], measured)
        if everyone := [one for measured in found.values() for one in measured]:
            yield records.memcpy(case, everyone)
        self._say(f"{case}: {time.monotonic() - began:.0f} s")

    def one_way(self, count: int) -> Iterator[Record[Case]]:
        """Latency of `count` messages of each way, a part of them in each of several turns."""
        case = Case(1, ONE_WAY)
        times: dict[Team, tuple[list[float], list[float]]] = {}
        for team in self._teams:
            try:
                self._begin(team, case)
            except (Failed, Refusal) as problem:
                yield self._absent(records.ONE_WAY, team, case, problem)
                continue
            times[team] = ([], [])
        for _ in range(_TURNS):
            for team in list(times):
                try:
                    for kept, more in zip(times[team], team.call("one_way", -(-count // _TURNS)), strict=True):
                        kept += more
                except (Failed, Refusal) as problem:
                    del times[team]
                    yield self._absent(records.ONE_WAY, team, case, problem)
        for team, (measured, bare) in times.items():
            team.call("end")
            figures = {"one_way_s": measured, "pipe_s": bare}
            yield Record(records.ONE_WAY, case, team.way.label, figures=figures)
        self._say(f"one-way latency, {size(ONE_WAY)}: done")

    def _begin(self, team: Team, case: Case) -> None:
        if not team.running:
            team.launch()
            team.wait()
        team.call("begin", case)

    def _absent(self, measure: str, team: Team, case: Case, problem: Failed | Refusal) -> Record[Case]:
        record = absent(measure, case, team.way.label, problem)
        self._say(f"{record.way}, {case}: {record.problem}")
        return record


def _turn(team: Team, rounds: int, *, look: bool, park: bool) -> list[Round]:
    return [team.call("round", look, park and number == rounds - 1) for number in range(rounds)]


def _check_room(way: Way, case: Case) -> None:
    """Raises Refusal."""
    needs = way.needs(case)
    lacking = 2 * case.nbytes + needs + _SPARE - available()
    if lacking > 0:
        raise Refusal(f"would need {lacking / MIB:.0f} MiB more memory than there is")
    if way.transport != "lane" and needs > shared_memory_room():
        raise Refusal(f"/dev/shm is too small for {needs / MIB:.0f} MiB")
