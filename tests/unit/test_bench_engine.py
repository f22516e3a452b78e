"""The engine benchmark without an engine: the probe's wrappers, and what is made of its notes."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bench.engine.asking import Answered, per_request, read_notes
from bench.engine.cases import Case, plan
from bench.engine.probe import sitecustomize as probe
from bench.engine.records import Results
from bench.engine.tables import grids
from bench.harness.memory import Memory, Peak
from bench.harness.results import Record
from bench.harness.tables import markdown
from bench.harness.turns import turns
from mmlane.lane import Lane, Reader

PROBE = Path(probe.__file__).parent


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(probe.DIRECTORY, str(tmp_path))
    return tmp_path


def request(*sizes: int) -> Any:
    items = [SimpleNamespace(feature=SimpleNamespace(nbytes=n), precomputed_embeddings=None) for n in sizes]
    return SimpleNamespace(mm_inputs=SimpleNamespace(mm_items=items))


def test_what_a_coroutine_waits_for_does_not_block(notes: Path) -> None:
    async def send() -> str:
        time.sleep(0.02)
        await asyncio.sleep(0.2)
        time.sleep(0.02)
        return "sent"

    assert asyncio.run(probe._sending(send)()) == "sent"
    (note,) = read_notes(notes)
    assert 0.04 <= note["s"] < 0.2


def put_with_the_probe() -> None:
    probe._watch_lane()
    with Lane({"tp": 1}, capacity=64 << 20) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(60)
        for _ in range(2):
            reader.discard(cast("bytes", lane.put(torch.zeros(1 << 20))))


def test_what_a_put_consists_of_is_noted(notes: Path) -> None:
    """In a process of its own, since the probe stays around the lane's functions."""
    process = multiprocessing.get_context("spawn").Process(target=put_with_the_probe)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    found = read_notes(notes)
    assert [note["what"] for note in found] == ["commit", "copy", "put"] * 2
    assert all(note["s"] > 0 for note in found)


def test_a_coroutine_sees_what_is_thrown_into_it(notes: Path) -> None:
    seen = []

    async def send() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def cancel() -> None:
        task = asyncio.create_task(probe._sending(send)())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert seen == ["cancelled"]
    assert [note["what"] for note in read_notes(notes)] == ["send"]


def test_bytes_before_and_after_wrapping(notes: Path) -> None:
    def wrap(obj: Any) -> Any:
        obj.mm_inputs.mm_items[0].feature = "a pointer"
        return obj

    probe._wrapping(wrap)(request(100, 10))
    (note,) = read_notes(notes)
    assert (note["bytes"], note["inline"]) == (110, 10)


ENGINE = """
class Scheduler:
    def __init__(self):
        pass
    def recv_requests(self):
        return []
"""
PLUGIN_THEN_PROBE = """
import sys, importlib.util
assert importlib.util.find_spec("sglang.srt.managers.scheduler")  # looking is not importing
from sglang.srt.managers import scheduler
theirs = scheduler.Scheduler.recv_requests = lambda self: ()
made = scheduler.Scheduler()
assert scheduler.Scheduler.recv_requests.__wrapped__ is theirs
assert made.recv_requests() == ()
once = scheduler.Scheduler.recv_requests
scheduler.Scheduler()
assert scheduler.Scheduler.recv_requests is once
"""


def test_the_probe_surrounds_what_a_plugin_put_there_once(tmp_path: Path) -> None:
    managers = tmp_path / "sglang" / "srt" / "managers"
    managers.mkdir(parents=True)
    (managers / "scheduler.py").write_text(ENGINE)
    env = {"PYTHONPATH": f"{PROBE}:{tmp_path}", probe.DIRECTORY: str(tmp_path)}
    command = [sys.executable, "-c", PLUGIN_THEN_PROBE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(json.dumps({"what": "send"}) + '\n{"what": "se')
    assert read_notes(tmp_path) == [{"what": "send"}]


def calls(*began: float) -> Sequence[dict[str, Any]]:
    return [{"what": "recv", "rank": 1, "began": at, "s": 0.5, "cpu": 0.1, "faults": 3} for at in began]


def test_calls_are_summed_for_each_request() -> None:
    answered = [Answered(0, 1), Answered(1, 2)]
    found = per_request(calls(0.1, 0.2, 1.5, 9.0), answered, concurrency=1)
    assert found["recv1_s"] == [1.0, 0.5]
    assert found["recv1_faults"] == [6, 3]
    assert per_request(calls(0.1, 0.2, 1.5), answered, concurrency=8)["recv1_s"] == [0.75]


def test_every_other_round_goes_backwards() -> None:
    assert list(turns(["off", "lane"], 2)) == [(0, "off"), (0, "lane"), (1, "lane"), (1, "off")]


def test_what_ends_an_engine_comes_last() -> None:
    for quick in (False, True):
        samples = [case.n for case in plan(quick=quick)]
        assert samples == sorted(samples)


def test_results_come_back_and_make_tables(tmp_path: Path) -> None:
    case = Case("image", 1)
    records = [
        Record("0.5.9", case, "off", figures={"latency_s": [0.1, 0.1], "send_s": [0.02, 0.02]}),
        Record("0.5.9", case, "lane", figures={"latency_s": [0.05, 0.05], "send_s": [0.01, 0.01]}),
        Record("0.5.9", Case("image", 1, n=8), "off", status="died", reason="no answer"),
    ]
    results = Results({"cores": 4}, records, [{"release": "0.5.9"}])
    results.save(tmp_path / "engine.json")
    assert Results.load(tmp_path / "engine.json") == results
    table = markdown("In the engine", "About.", grids(results))
    assert "| 1 image, 1 at a time | 100 / 100 | 50.0 / 50.0 (0.50 x) |" in table
    assert "died, no answer" in table
    assert "several at a time" not in table


def test_peak_of_memory() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "x = b'1' * (64 << 20); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        before = Memory.of([child.pid])
        with Peak([child.pid]) as peak:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.2)
        assert peak.found.all >= 64 << 20
        assert peak.found.shared <= before.shared + (64 << 20)
    finally:
        child.communicate(b"\n")
