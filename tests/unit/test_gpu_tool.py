"""`make gpu` as far as it goes without a GPU: its parts, how it goes on, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.measures import MEASURES
from tools import gpu


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu, "commit", lambda: "this")
    return tmp_path


def give(monkeypatch: pytest.MonkeyPatch, **parts: str) -> None:
    """Parts that are lines of Python."""
    monkeypatch.setattr(gpu, "parts", lambda: {name: ["-c", code] for name, code in parts.items()})


def test_all_measures_are_parts() -> None:
    assert tuple(MEASURES) == gpu.MEASURES
    assert list(gpu.parts()) == ["tests", *MEASURES, "engine"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 0
    assert "no torch that sees a GPU" in capsys.readouterr().err


def test_what_has_passed_is_not_run_again(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = build / "count"
    give(monkeypatch, good=f"open({str(count)!r}, 'a').write('x')", bad="raise SystemExit(3)")
    assert gpu.run(Path(sys.executable), ["good", "bad"], again=False) == 1
    assert gpu.run(Path(sys.executable), ["good", "bad"], again=False) == 1
    assert count.read_text() == "x"
    found = json.loads((build / "gpu.json").read_text())
    assert found["commit"] == "this"
    assert {name: part["status"] for name, part in found["parts"].items()} == {"good": 0, "bad": 3}
    assert gpu.run(Path(sys.executable), ["good"], again=True) == 0
    assert count.read_text() == "xx"


def test_another_commit_begins_anew(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, good="print('printed')")
    assert gpu.run(Path(sys.executable), ["good"], again=False) == 0
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    (build / "good.log").unlink()
    assert gpu.run(Path(sys.executable), ["good"], again=False) == 0
    assert (build / "good.log").read_text() == "printed\n"


def test_one_that_takes_too_long_is_ended(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, long="import signal; signal.pause()")
    monkeypatch.setattr(gpu, "LIMIT_S", 0.5)
    assert gpu.run(Path(sys.executable), ["long"], again=False) == 1
    assert "not within" in json.loads((build / "gpu.json").read_text())["parts"]["long"]["status"]


def test_its_environment_has_what_lies_beside_torch(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And mmlane from the folder of wheels; here none of the packages is missing, so pip has nothing to fetch."""
    asked: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return None if "pip" in command else real(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    beside = str(Path(torch.__file__).parents[1])
    python = gpu.environment(Path("wheels"), beside)
    assert asked[1][asked[1].index("install") :][:4] == ["install", "--no-index", "--find-links", "wheels"]
    code = "import torch; print(torch.__file__)"
    assert real([python, "-c", code], capture_output=True, text=True).stdout.strip() == torch.__file__
    assert gpu.environment(Path("wheels"), beside) == python and len(asked) == 2
