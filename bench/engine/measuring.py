"""Starts servers, asks them, and makes records of what came of it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine.cases import QUICK_REQUESTS, REQUESTS, Bodies, Case, answers
from bench.engine.memory import Memory, Peak, faults
from bench.engine.probe.sitecustomize import DIRECTORY
from bench.engine.records import Record, Results
from devkit.client import Reply
from devkit.demo import complaint, ends_within
from devkit.server import EngineServer

_PROBE = Path(__file__).with_name("probe")
_DEATH_S = 30.0  # how long an engine may take to go down after it broke a connection
_MOST_UNCOUNTED = 8
_NO_CACHES = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
_MESSAGE = 120


class Unanswered(RuntimeError):
    """A request was not answered as it should be; the message is the record's reason."""


@dataclass(frozen=True)
class Answered:
    """When a request was sent, and when its answer was there."""

    began: float
    ended: float


class Measuring:
    """One release in one mode and round: the cases, on one server, or more where it dies."""

    def __init__(
        self,
        release: str,
        mode: str,
        round_: int,
        *,
        wheel: Path | None,
        quick: bool,
        caches: bool,
        results: Results,
        keep: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._release, self._mode, self._round = release, mode, round_
        self._wheel, self._quick, self._caches = wheel, quick, caches
        self._results, self._keep, self._say = results, keep, say
        self._bodies = Bodies()

    def run(self, cases: Iterable[Case]) -> None:
        """Measure all, and keep each as soon as it is there. Raises ServerDied when a server does not start."""
        waiting = list(cases)
        while waiting:
            with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as notes, ExitStack() as stack:
                server = stack.enter_context(self._server(Path(notes)))
                stack.callback(server.close)
                self._ready(server)
                while waiting and server.alive():
                    case = waiting.pop(0)
                    record = self._measure(server, Path(notes), case)
                    self._results.records.append(record)
                    self._keep()
                    self._say(f"  {case}: {_in_words(record)}")

    def _server(self, notes: Path) -> EngineServer:
        env = {"PYTHONPATH": str(_PROBE), DIRECTORY: str(notes)}
        if self._wheel is not None:
            env["MMLANE"] = self._mode
        if not self._caches:
            env |= _NO_CACHES
        args = [] if self._caches else ["--disable-radix-cache"]
        return EngineServer(self._release, plugin=self._wheel, env=env, args=args)

    def _ready(self, server: EngineServer) -> None:
        """Every list of images once, and what there is then is where memory is counted from."""
        said = [line for line in server.log().splitlines() if line.startswith("mmlane: ")]
        self._results.servers.append(
            {"release": self._release, "mode": self._mode, "round": self._round, "said": said}
        )
        self._say(f"{self._release}, {self._mode}: ready in {server.startup_s:.0f} s")
        server.client.post("/generate", self._bodies.next(Case("text")))
        self._pids = [process.pid for process in server.processes()]
        self._before = Memory.of(self._pids)
        for body in self._bodies.all_popular():
            server.client.post("/generate", body)

    def _measure(self, server: EngineServer, notes: Path, case: Case) -> Record:
        if any(r.status == "died" and r.case.workload == case.workload for r in self._alike()):
            return self._record(case, status="not tried", reason="it died of that before")
        count = (QUICK_REQUESTS if self._quick else REQUESTS)[case.concurrency]
        ranks = dict(enumerate(sorted_ranks(server)))
        processes = {"tokenizer": server.pid, **{f"rank{rank}": pid for rank, pid in ranks.items()}}
        try:
            ask(server, [self._bodies.next(case) for _ in range(min(case.concurrency + 1, _MOST_UNCOUNTED))], case)
            before = {name: faults(pid) for name, pid in processes.items()}
            bodies = [self._bodies.next(case) for _ in range(count)]
            with Peak(self._pids) as peak:
                answered = ask(server, bodies, case)
            after = {name: faults(pid) for name, pid in processes.items()}
        except Unanswered as reason:
            died = ends_within(server, _DEATH_S) if "no answer" in str(reason) else not server.alive()
            return self._record(case, status="died" if died else "failed", reason=str(reason))
        figures = per_request(read_notes(notes), answered, case.concurrency)
        figures["latency_s"] = [a.ended - a.began for a in answered]
        for name in processes:
            figures[f"faults_{name}"] = [(after[name] - before[name]) / count]
        figures["shared"] = [(peak.found.shared - self._before.shared) / case.concurrency]
        figures["all"] = [(peak.found.all - self._before.all) / case.concurrency]
        return self._record(case, requests=count, figures=figures)

    def _alike(self) -> Iterator[Record]:
        """What this release in this mode has come to so far, in earlier rounds too."""
        return (r for r in self._results.records if (r.release, r.mode) == (self._release, self._mode))

    def _record(self, case: Case, **more: Any) -> Record:
        return Record(self._release, self._mode, self._round, case, **more)


def ask(server: EngineServer, bodies: Sequence[Mapping[str, Any]], case: Case) -> list[Answered]:
    """Send all, so many at a time; raises Unanswered for the first that is not answered in full."""

    def one(body: Mapping[str, Any]) -> Answered:
        began = time.monotonic()
        try:
            reply = server.client.post("/generate", body)
        except TimeoutError as late:
            reply = Reply(0, {"error": str(late)})
        ended = time.monotonic()
        if reply.status == 0:
            raise Unanswered("no answer")
        if reply.status != 200:
            raise Unanswered(f"{reply.status}: {complaint(reply)}"[:_MESSAGE])
        if (found := answers(reply.body)) != case.n:
            raise Unanswered(f"{found} answers")
        return Answered(began, ended)

    threads = ThreadPoolExecutor(case.concurrency)
    futures = [threads.submit(one, body) for body in bodies]
    waits = False  # when interrupted: requests under way end with their server
    try:
        answered = [future.result() for future in futures]
        waits = True
    except Unanswered:
        waits = True
        raise
    finally:
        threads.shutdown(wait=waits, cancel_futures=True)
    return answered


def sorted_ranks(server: EngineServer) -> list[int]:
    """The pids of the schedulers, by rank."""
    titled = [process for process in server.processes() if "scheduler" in process.title]
    return [process.pid for process in sorted(titled, key=lambda process: process.title)]


def read_notes(directory: Path) -> list[dict[str, Any]]:
    """What the probe has noted in all processes so far; the last line of a killed one may be half a line."""
    found = []
    for file in directory.glob("*.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found.append(json.loads(line))
    return found


def per_request(
    notes: Iterable[Mapping[str, Any]], answered: Sequence[Answered], concurrency: int
) -> dict[str, list[float]]:
    """The probe's notes as sums for each request where they came one at a time, and otherwise as their mean."""
    if concurrency == 1:
        windows = [(a.began, a.ended, 1) for a in answered]
    else:
        windows = [(min(a.began for a in answered), max(a.ended for a in answered), len(answered))]
    sums: list[dict[str, float]] = [{} for _ in windows]
    for note in notes:
        for (began, ended, count), total in zip(windows, sums, strict=True):
            if began <= note["began"] < ended:
                for key, value in _figures(note):
                    total[key] = total.get(key, 0.0) + value / count
    keys = {key for total in sums for key in total}
    return {key: [total.get(key, 0.0) for total in sums] for key in sorted(keys)}


def _figures(note: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    what = f"{note['what']}{note['rank']}" if "rank" in note else note["what"]
    yield from ((f"{what}_{key}", note[key]) for key in ("s", "cpu", "faults"))
    if note["what"] == "wrap":
        yield from ((key, note[key]) for key in ("bytes", "inline"))


def _in_words(record: Record) -> str:
    if record.status != "ok":
        return f"{record.status}, {record.reason}"
    latency = sorted(record.figures["latency_s"])[record.requests // 2]
    return f"{latency * 1e3:.0f} ms"


def order(modes: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Rounds of modes, every other one backwards."""
    for number in range(rounds):
        for mode in modes[:: -1 if number % 2 else 1]:
            yield number, mode
