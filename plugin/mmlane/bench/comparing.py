"""Goes through the cases; in each, every way has a turn in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmlane.bench.case import Case
from mmlane.bench.results import Comparison, Outcome, Results
from mmlane.bench.rounds import Round
from mmlane.bench.team import Team
from mmlane.bench.ways import Way
from mmlane.bench.workers import Failed, Refusal

MOST_ROUNDS = 25
_SETTLING_S = 60.0  # in which a lane of an engine has to open
_SLOW_S = 1.0  # a first round that takes longer is the only one that does not count

Plan = list[tuple[Case, list[Way]]]
Told = Callable[[str], None]


class Comparing:
    """`seconds`: after that no round begins, but for the first of the first case. `say`: told what is done now.

    `results` has what was found so far, also when a method has been interrupted.
    """

    def __init__(self, plan: Plan, *, seconds: float, scratch: Path, say: Told) -> None:
        self.results = Results()
        self._plan = plan
        self._end = time.monotonic() + seconds
        self._say = say
        readers = max(case.readers for case, _ in plan)
        ways = list(dict.fromkeys(way for _, ways in plan for way in ways))
        self._teams = {way: Team(way, readers, scratch) for way in ways}
        self._gone: dict[Way, str] = {}  # ways whose processes have ended, and why

    def run(self) -> None:
        """Start all processes, measure, end them: also when interrupted."""
        try:
            self._start()
            for number, (case, ways) in enumerate(self._plan):
                now = time.monotonic()
                if number and now >= self._end:
                    self.results.left_out += [
                        f"{Comparison.of(case, ways)}: the time was over" for case, ways in self._plan[number:]
                    ]
                    return
                self._compare(case, ways, now + (self._end - now) / (len(self._plan) - number))
        finally:
            for team in self._teams.values():
                team.leave()
            for team in self._teams.values():
                team.end()

    def _start(self) -> None:
        self._say("starting the processes")
        for team in self._teams.values():
            team.launch()
        for way, team in self._teams.items():
            self._guarded(way, team.wait)
            self.results.notes += [f"{way.label}: {note}" for note in team.notes]

    def _compare(self, case: Case, ways: Sequence[Way], until: float) -> None:
        """Rounds of all ways that can, the last of them begun before `until`; one at least."""
        comparison = Comparison.of(case, ways)
        self.results.comparisons.append(comparison)
        there = list(zip(ways, comparison.outcomes, strict=True))
        self._say(f"{comparison}: uncounted rounds")
        there = self._each(there, lambda way, _: self._begin(way, case))
        for number in range(MOST_ROUNDS):
            if not there or (number and time.monotonic() >= until):
                break
            self._say(f"{comparison}: round {number + 1}")
            there = self._each(there[::-1], self._measure)  # forwards and backwards
        self._each(there, lambda way, _: self._teams[way].call("end"))

    def _begin(self, way: Way, case: Case) -> None:
        """Have a way open, and its uncounted rounds, as many as it needs."""
        team = self._teams[way]
        team.call("begin", case)
        first: Round = team.call("round", True, False)
        deadline = time.monotonic() + _SETTLING_S
        while not team.call("is_settled"):
            if time.monotonic() > deadline:
                raise Failed(f"it did not get ready in {_SETTLING_S:g} s\n{team.trace()}")
            team.call("round", False, False)
        if first.cost_s < _SLOW_S:
            team.call("round", True, False)

    def _measure(self, way: Way, outcome: Outcome) -> None:
        found: Round = self._teams[way].call("round", False, False)
        outcome.cost_s.append(found.cost_s)
        outcome.put_s.append(found.put_s)
        outcome.memcpy_s.append(found.memcpy_s)

    def _each(
        self, there: list[tuple[Way, Outcome]], do: Callable[[Way, Outcome], object]
    ) -> list[tuple[Way, Outcome]]:
        """Do it for each; those that can go on. The outcome of one that cannot has the reason, and no figures."""
        able = []
        for way, outcome in there:
            if way not in self._gone:
                self._guarded(way, lambda: do(way, outcome))  # noqa: B023 - called at once
            if way in self._gone:
                outcome.problem = self._gone[way]
                outcome.cost_s.clear()
                outcome.put_s.clear()
            else:
                able.append((way, outcome))
        return able

    def _guarded(self, way: Way, do: Callable[[], object]) -> None:
        try:
            do()
        except (Failed, Refusal) as problem:
            self._teams[way].end()
            self._gone[way] = str(problem)
