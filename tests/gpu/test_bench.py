"""The GPU benchmark for real, in short: that it is complete, never how fast anything is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.device import lacking
from bench.gpu.measures import MEASURES
from bench.gpu.records import Results, goals

CHECKOUT = Path(__file__).resolve().parents[2]
LACKING = lacking(None)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]


def test_a_quick_run_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.load(tmp_path / "gpu.json")
    assert not results.note
    assert all(results.cases(measure) for measure in MEASURES)
    one = torch.cuda.device_count() == 1
    for record in results.records:
        if record.status == "ok":
            assert record.figures and all(record.figures.values())
        else:
            reason = record.reason or ""
            assert record.status == "skipped", reason
            known = ("/dev/shm", "no peer access")
            assert (one and reason.startswith("two GPUs wanted")) or any(words in reason for words in known)
    assert {goal.verdict for goal in goals(results)} <= {"met", "MISSED"}
    assert results.machine["gpus"][0]["name"]
    assert "| goal | wanted |" in (tmp_path / "gpu.md").read_text()
