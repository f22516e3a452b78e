"""Goes through the cases: every way has its turn in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from bench.harness.memory import available
from bench.harness.results import Record, absent
from bench.harness.sizes import GIB, MIB, size
from bench.harness.turns import each
from bench.transport import records
from bench.transport.cases import ONE_WAY
from bench.transport.team import Team, shared_memory_room
from bench.transport.ways import Way
from mmlane.bench.case import Case
from mmlane.bench.rounds import Round
from mmlane.bench.workers import Failed, Refusal

_SMALL = 4 * MIB  # up to here a round takes next to no time, and varies more
_MORE_ROUNDS = 4
_ENOUGH_S = 4.0  # a way that has spent so long on a case needs no more rounds
_FEWEST = 3
_SLOW_S = 2.0  # a way whose first round takes longer than this needs no second one to warm up
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
        uncounted: dict[Team, list[Round]] = {team: [] for team in self._teams}
        found: dict[Team, list[Round]] = {team: [] for team in self._teams}
        spent = dict.fromkeys(self._teams, 0.0)

        def begin(team: Team) -> None:
            _check_room(team.way, case)
            _begin(team, case)
            uncounted[team] += _turn(team, 1, look=True, park=park)
            if uncounted[team][0].cost_s < _SLOW_S:
                uncounted[team] += _turn(team, 1, look=True, park=park)

        def measure(team: Team) -> None:
            if spent[team] > _ENOUGH_S and len(found[team]) >= _FEWEST:
                return
            before = time.monotonic()
            found[team] += _turn(team, in_turn, look=False, park=park)
            spent[team] += time.monotonic() - before

        there = list(self._teams)
        for do in (begin, *[measure] * turns, _end):
            yield from self._each(records.COST, case, there, do)
        for team in there:
            yield records.cost(team.way, case, uncounted[team], found[team])
        if everyone := [one for team in there for one in found[team]]:
            yield records.memcpy(case, everyone)
        self._say(f"{case}: {time.monotonic() - began:.0f} s")

    def one_way(self, count: int) -> Iterator[Record[Case]]:
        """Latency of `count` messages of each way, a part of them in each of several turns."""
        case = Case(1, ONE_WAY)
        times: dict[Team, tuple[list[float], list[float]]] = {team: ([], []) for team in self._teams}

        def measure(team: Team) -> None:
            for kept, more in zip(times[team], team.call("one_way", -(-count // _TURNS)), strict=True):
                kept += more

        there = list(self._teams)
        for do in (lambda team: _begin(team, case), *[measure] * _TURNS, _end):
            yield from self._each(records.ONE_WAY, case, there, do)
        for team in there:
            measured, bare = times[team]
            yield Record(records.ONE_WAY, case, team.way.label, figures={"one_way_s": measured, "pipe_s": bare})
        self._say(f"one-way latency, {size(ONE_WAY)}: done")

    def _each(
        self, measure: str, case: Case, there: list[Team], do: Callable[[Team], object]
    ) -> Iterator[Record[Case]]:
        for team, problem in each(there, do):
            record = absent(measure, case, team.way.label, problem)
            self._say(f"{record.way}, {case}: {record.problem}")
            yield record


def _begin(team: Team, case: Case) -> None:
    if not team.running:
        team.launch()
        team.wait()
    team.call("begin", case)


def _end(team: Team) -> None:
    team.call("end")


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
