"""Asks a server that has the probe in it, and makes figures of what the probe has noted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine.cases import Case, answers
from bench.engine.probe import sitecustomize as probe
from devkit.client import Reply
from devkit.demo import complaint
from devkit.server import EngineServer

_MESSAGE = 120


class Unanswered(RuntimeError):
    """A request was not answered as it should be; the message says what came instead."""


@dataclass(frozen=True)
class Answered:
    """When a request was sent, and when its answer was there."""

    began: float
    ended: float

    @property
    def took(self) -> float:
        return self.ended - self.began


def probed(notes: Path) -> dict[str, str]:
    """What an engine needs in its environment for the probe to write its notes to that directory."""
    return {"PYTHONPATH": str(Path(probe.__file__).parent), probe.DIRECTORY: str(notes)}


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


def slowest(figures: Mapping[str, Sequence[float]], what: str, ranks: int) -> list[float]:
    """Seconds for each request, of the rank for which it took longest; one may have begun before all of them."""
    found = [figures[key] for rank in range(ranks) if (key := f"{what}{rank}_s") in figures]
    return [max(each) for each in zip(*found, strict=True)]


def _figures(note: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    what = f"{note['what']}{note['rank']}" if "rank" in note else note["what"]
    yield from ((f"{what}_{key}", note[key]) for key in ("s", "cpu", "faults"))
    if note["what"] == "wrap":
        yield from ((key, note[key]) for key in ("bytes", "inline"))
