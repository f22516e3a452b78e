"""The ratios that quick benchmarks leave behind, and what `tools.ratios` says of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.engine import records as engine
from bench.engine.cases import Case
from bench.gpu import records as gpu
from bench.gpu.ways import LANE_PINNED, TORCH_PINNED
from bench.harness import ratios as written
from bench.harness.ratios import Spread, extremes, put, quartiles
from bench.harness.results import Record
from bench.harness.sizes import MIB
from bench.releases import NEWEST
from bench.transport import goals as transport
from bench.transport.records import Results
from mmlane.bench.case import Case as Message
from tools.ratios import main

HERE = {"cores": 2, "processor": "x", "memory_bytes": 4 << 30, "commit": "abc", "began": "today"}


def git(top: Path, *words: str) -> None:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *named, *words], cwd=top, check=True)


def line(commit: str, machine: str = "2 cores", **ratios: list[float]) -> str:
    return json.dumps({"commit": commit, "machine": machine, "when": "today", "ratios": ratios}) + "\n"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A checkout of two commits; the first has lines of two machines, and the second, today's, one of its own."""
    (tmp_path / "bench" / "out").mkdir(parents=True)
    (tmp_path / ".gitignore").write_text("bench/out/\n")
    kept = tmp_path / "bench" / "ratios.jsonl"
    git(tmp_path, "init", "--quiet")
    first = line("one", same=[1.0, 0.9, 1.1], slower=[1.0, 0.9, 1.1], gone=[2.0, 2.0, 2.0])
    kept.write_text(first + line("two", "64 cores", same=[5.0, 4.0, 6.0]))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    with kept.open("a") as more:
        more.write(line("three", slower=[9.0, 9.0, 9.0]))
    git(tmp_path, "commit", "--quiet", "-a", "-m", "two")
    return tmp_path


def measured(top: Path, machine: str = "2 cores", commit: str = "now") -> None:
    new = line(commit, machine, same=[1.15, 1.05, 1.2], slower=[1.3, 1.2, 1.4], fresh=[0.5, 0.4, 0.6])
    (top / "bench" / "out" / "ratios.json").write_text(new)


def test_what_moved_since_the_parent(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(top)
    assert main([], top) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ratios of now, today, 2 cores",
        "beside    one, today, 2 cores",
        "moved +30%  slower: 1 (0.9 - 1.1) -> 1.3 (1.2 - 1.4)",
        "new          fresh: 0.5 (0.4 - 0.6)",
        "not measured gone: was 2 (2 - 2)",
        "1 of 2 moved beyond their spread",
    ]


def test_what_is_not_committed_has_this_commit_for_its_parent(
    top: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(top)
    (top / ".gitignore").write_text("bench/out/\n# changed\n")
    assert main([], top) == 0
    assert "moved -86%  slower: 9 (9 - 9) -> 1.3 (1.2 - 1.4)" in capsys.readouterr().out


def test_another_machine(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(top, "8 cores")
    assert main([], top) == 0
    said = capsys.readouterr().out
    assert "beside    two, today, 64 cores\n! another machine" in said


def head(top: Path) -> str:
    command = ["git", "describe", "--always"]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, check=True).stdout.strip()


def test_the_line_is_kept_when_asked_for(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(top, commit=head(top))
    before = (top / "bench" / "ratios.jsonl").read_text()
    assert main([], top) == 0
    assert (top / "bench" / "ratios.jsonl").read_text() == before
    assert main(["--keep", "--note", "busy"], top) == 0
    *old, new = (top / "bench" / "ratios.jsonl").read_text().splitlines()
    assert "".join(f"{one}\n" for one in old) == before
    assert (json.loads(new)["commit"], json.loads(new)["note"]) == (head(top), "busy")
    assert main([], top) == 0  # there are uncommitted changes now: compared with what this commit has
    assert "beside    three" in capsys.readouterr().out


def test_a_line_of_another_tree_is_not_kept(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (top / "bench" / "ratios.jsonl").read_text()
    second = head(top)
    git(top, "commit", "--quiet", "--allow-empty", "-m", "three")
    for commit, problem in (
        (f"{head(top)}-dirty", "uncommitted changes; commit them"),
        (second, f"and this commit is {head(top)}"),
        ("unknown", f"and this commit is {head(top)}"),
    ):
        measured(top, commit=commit)
        assert main(["--keep"], top) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"not kept: the line is of {commit}, ") and problem in said
    assert (top / "bench" / "ratios.jsonl").read_text() == before


def test_nothing_to_compare(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], top) == 1
    assert "run `make bench QUICK=1` first" in capsys.readouterr().err
    measured(top)
    git(top, "rm", "--quiet", "--cached", "bench/ratios.jsonl")
    git(top, "commit", "--quiet", "-m", "without")
    git(top, "commit", "--quiet", "--allow-empty", "-m", "after that")
    assert main([], top) == 0
    assert "git has none to compare with" in capsys.readouterr().out


# --- what benchmarks write ----------------------------------------------------------------------------------


def test_spreads() -> None:
    assert quartiles([1, 2, 3, 4, 5]) == (3, 2, 4)
    assert quartiles([7]) == extremes([7]) == (7, 7, 7)
    assert extremes([3, 1, 8]) == (3, 1, 8)
    assert Spread(4, 2, 8).over(Spread(2, 1, 4)) == (2, 0.5, 8)
    assert Spread(4, 2, 8).over(Spread(0, 0, 0)) is None
    assert Spread(4, -1, 8).over(Spread(2, 1, 4)) is None


def test_each_benchmark_has_its_own_ratios_on_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = dict(HERE)
    monkeypatch.setattr(written, "facts", lambda: dict(known))

    def after(benchmark: str, ratios: Mapping[str, Spread | None]) -> dict[str, Any]:
        path = put(benchmark, ratios, tmp_path)
        (only,) = path.read_text().splitlines()
        found: dict[str, Any] = json.loads(only)["ratios"]
        return found

    third = Spread(1 / 3, 1 / 3, 1 / 3)
    assert after("engine", {"old": third, "none": None}) == {"engine: old": [0.3333] * 3}
    assert set(after("text", {"a": third})) == {"engine: old", "text: a"}
    assert set(after("engine", {"new": third})) == {"text: a", "engine: new"}
    known["commit"] = "def"
    assert set(after("engine", {"new": third})) == {"engine: new"}
    known["cores"] = 3
    assert set(after("text", {"a": third})) == {"text: a"}


def test_ratios_of_the_transports() -> None:
    case = Message(1, 16 * MIB)

    def record(way: str, *seconds: float) -> Record[Message]:
        return Record("cost", case, way, figures={"cost_s": list(seconds), "memcpy_s": [0.5]})

    view, cow = record("lane view", 1, 0.5, 2), record("lane cow", 3, 3, 3)
    theirs = record(f"engine {NEWEST}", 10, 5, 20)
    assert transport.ratios(Results({}, [view, theirs, cow])) == {
        f"16 MiB, 1 reader: lane view over engine {NEWEST}": (0.1, 0.025, 0.4),
        "16 MiB, 1 reader: lane view over memcpy": (2, 1, 4),
        f"16 MiB, 1 reader: lane cow over engine {NEWEST}": (0.3, 0.15, 0.6),
    }
    failed: Record[Message] = Record("cost", case, f"engine {NEWEST}", "failed", "it ended")
    assert transport.ratios(Results({}, [cow, failed])) == {}


def test_ratios_of_the_engine() -> None:
    def record(mode: str, figure: float, **case: int) -> Record[Case]:
        figures = {"latency_s": [figure] * 3, "send_s": [figure / 10] * 3}
        return Record("0.5.23", Case("image", 1, **case), mode, figures=figures)

    cases: list[dict[str, int]] = [{}, {"concurrency": 8}, {"n": 8}]
    records = [record(mode, figure, **case) for case in cases for mode, figure in (("off", 2), ("lane", 1))]
    assert engine.ratios(engine.Results(records=records)) == {
        "0.5.23, 1 image, 1 at a time: latency, lane over off": (0.5, 0.5, 0.5),
        "0.5.23, 1 image, 1 at a time: blocked, lane over off": (0.5, 0.5, 0.5),
        "0.5.23, 1 image, 8 at a time: latency, lane over off": (0.5, 0.5, 0.5),
    }


def test_ratios_on_a_gpu() -> None:
    results = gpu.Results(machine={"gpus": [{"name": "NVIDIA X"}]})
    for way, rate in ((LANE_PINNED, 50.0), (TORCH_PINNED, 100.0)):
        results.records.append(Record("h2d", "1 MiB", way, figures={"GB/s": [rate], "again": [1.0]}))
    assert gpu.ratios(results) == {
        f"NVIDIA X, h2d, 1 MiB: GB/s, {LANE_PINNED} over {TORCH_PINNED}": (0.5, 0.5, 0.5)
    }
