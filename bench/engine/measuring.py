"""Starts servers, asks them, and makes records of what came of it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from bench.engine.asking import Unanswered, ask, per_request, probed, read_notes
from bench.engine.cases import QUICK_REQUESTS, REQUESTS, Bodies, Case
from bench.engine.records import REFERENCE, Results
from bench.harness.command import SCRATCH
from bench.harness.memory import Memory, Peak, faults
from bench.harness.results import Record
from devkit.demo import ends_within
from devkit.server import EngineServer

_DEATH_S = 30.0  # how long an engine may take to go down after it broke a connection
_MOST_UNCOUNTED = 8


class Measuring:
    """One release in one mode and round: the cases, on one server, or more where it dies."""

    def __init__(
        self, release: str, mode: str, wheel: Path, results: Results, path: Path, say: Callable[[str], None]
    ) -> None:
        self._release, self._mode = release, mode
        self._plugin = None if mode == REFERENCE else wheel
        self._results, self._path, self._say = results, path, say
        self._bodies = Bodies()

    def run(self, cases: Iterable[Case]) -> None:
        """Measure all, and keep each as soon as it is there. Raises ServerDied when a server does not start."""
        waiting = list(cases)
        while waiting:
            with tempfile.TemporaryDirectory(prefix=SCRATCH) as notes, ExitStack() as stack:
                server = stack.enter_context(self._server(Path(notes)))
                stack.callback(server.close)
                self._ready(server)
                while waiting and server.alive():
                    case = waiting.pop(0)
                    record = self._measure(server, Path(notes), case)
                    self._results.records.append(record)
                    self._results.save(self._path)
                    self._say(f"  {case}: {_in_words(record)}")

    def _server(self, notes: Path) -> EngineServer:
        env = probed(notes)
        if self._plugin is not None:
            env["MMLANE"] = self._mode
        args = []
        if not self._results.machine["caches"]:
            env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
            args = ["--disable-radix-cache"]
        return EngineServer(self._release, plugin=self._plugin, env=env, args=args)

    def _ready(self, server: EngineServer) -> None:
        """Every list of images once, and what there is then is where memory is counted from."""
        said = [line for line in server.log().splitlines() if line.startswith("mmlane: ")]
        self._results.servers.append({"release": self._release, "mode": self._mode, "said": said})
        self._say(f"{self._release}, {self._mode}: ready in {server.startup_s:.0f} s")
        server.client.post("/generate", self._bodies.next(Case("text")))
        self._pids = [process.pid for process in server.processes()]
        self._before = Memory.of(self._pids)
        for body in self._bodies.all_popular():
            server.client.post("/generate", body)

    def _measure(self, server: EngineServer, notes: Path, case: Case) -> Record[Case]:
        # In earlier rounds too.
        before = (r for r in self._results.records if (r.group, r.way) == (self._release, self._mode))
        if any(r.status == "died" and r.case.workload == case.workload for r in before):
            return Record(self._release, case, self._mode, "not tried", "it died of that before")
        count = (QUICK_REQUESTS if self._results.machine["quick"] else REQUESTS)[case.concurrency]
        ranks = dict(enumerate(sorted_ranks(server)))
        processes = {"tokenizer": server.pid, **{f"rank{rank}": pid for rank, pid in ranks.items()}}
        try:
            ask(server, [self._bodies.next(case) for _ in range(min(case.concurrency + 1, _MOST_UNCOUNTED))], case)
            faults_before = {name: faults(pid) for name, pid in processes.items()}
            bodies = [self._bodies.next(case) for _ in range(count)]
            with Peak(self._pids) as peak:
                answered = ask(server, bodies, case)
            faults_after = {name: faults(pid) for name, pid in processes.items()}
        except Unanswered as reason:
            died = ends_within(server, _DEATH_S) if "no answer" in str(reason) else not server.alive()
            return Record(self._release, case, self._mode, "died" if died else "failed", str(reason))
        figures = per_request(read_notes(notes), answered, case.concurrency)
        figures["latency_s"] = [each.took for each in answered]
        for name in processes:
            figures[f"faults_{name}"] = [(faults_after[name] - faults_before[name]) / count]
        figures["shared"] = [(peak.found.shared - self._before.shared) / case.concurrency]
        figures["all"] = [(peak.found.all - self._before.all) / case.concurrency]
        return Record(self._release, case, self._mode, figures=figures)


def sorted_ranks(server: EngineServer) -> list[int]:
    """The pids of the schedulers, by rank."""
    titled = [process for process in server.processes() if "scheduler" in process.title]
    return [process.pid for process in sorted(titled, key=lambda process: process.title)]


def _in_words(record: Record[Case]) -> str:
    if record.status != "ok":
        return record.problem
    return f"{statistics.median(record.figures['latency_s']) * 1e3:.0f} ms"
