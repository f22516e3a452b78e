"""`mmlane bench` on a GPU: that the way there is measured and complete, never how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench.gpu.device import lacking

LACKING = lacking(None)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]


def test_the_way_to_the_gpu_is_compared() -> None:
    words = ["--sizes", "1M,16M", "--n", "1", "--readers", "2", "--seconds", "60", "--json"]
    command = [sys.executable, "-m", "mmlane", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["gpu"] == torch.cuda.get_device_name(0) and not found["left_out"]
    there = [one for one in found["comparisons"] if one["device"] == "cuda:0"]
    assert [one["bytes"] for one in there] == [1 << 20, 16 << 20]
    for comparison in there:
        assert [way["way"] for way in comparison["ways"]] == ["segment-device", "lane-device"]
        assert all(way["problem"] is None and way["rounds"] >= 1 for way in comparison["ways"])
