"""docs/rl_example.py: one process renders images, several workers answer samples of each."""

from __future__ import annotations

import runpy
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import numpy
import torch

from mmlane.lane import Refused

EXAMPLE = Path(__file__).parents[2] / "docs" / "rl_example.py"
DEADLINE = 300.0


def test_it_runs_and_copies_each_image_once() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    *rounds, total = done.stdout.splitlines()
    assert rounds == [f"image {number}: rewards {[float(number)] * 6}" for number in range(4)]
    assert total == f"24 tickets, {4 * 3 * 720 * 1280 * 4} bytes copied"


def test_an_image_for_which_there_is_no_room_is_sent_itself() -> None:
    send = runpy.run_path(str(EXAMPLE))["send"]
    here, there = Pipe()
    image = torch.rand(3, 4)
    send(Refused("full", "no room"), image, here)
    got = there.recv()
    assert isinstance(got, numpy.ndarray) and torch.equal(torch.from_numpy(got), image)
