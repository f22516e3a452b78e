"""`mmlane bench` with an engine: every way measures on the release, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from devkit.environment import engine_environment
from devkit.sharedmemory import can_be_private, privately
from tests.engine import forks

pytestmark = pytest.mark.engine

ENV = {**forks.ENV, "MMLANE_DISABLE": "lane"}  # settings of the user's are not those of the comparison
SHORT = ("--sizes", "1M,4M", "--n", "1,3", "--readers", "2", "--seconds", "20", "--json")
DEADLINE = 800.0  # seconds; only a fault takes that long
LIST = '"$@"; code=$?; ls /dev/shm >&2; exit $code'


def command(release: str, plugin_wheel: Path, *words: str) -> list[str]:
    python = engine_environment(release, plugin=plugin_wheel).python
    return [str(python), "-m", "mmlane", "bench", *words]


@pytest.mark.matrix
@pytest.mark.releases(
    "0.5.12.post1", "0.5.9", "0.5.10", "0.5.13", "0.5.15", "0.5.18", "0.5.19", "0.5.21", "newest"
)
def test_every_way_measures(release: str, plugin_wheel: Path) -> None:
    words = command(release, plugin_wheel, *SHORT)
    if can_be_private():
        words = privately(["sh", "-c", LIST, "sh", *words], 1 << 30)
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["engine"] == release and found["error"] is None
    assert found["comparisons"]
    for comparison in found["comparisons"]:
        ways = {way["way"]: way for way in comparison["ways"]}
        assert list(ways) == ["engine", "backport", "lane", "lane-alone"]
        for way in ways.values():
            assert way["problem"] is None and way["rounds"] >= 1 and way["cost_s"] > 0
        assert comparison["baseline"] == "engine" and ways["engine"]["over_baseline"] == 1
    assert not [line for line in found["notes"] if "CUDA" not in line]  # no patch was left out
    if can_be_private():
        assert done.stderr.endswith("s\n"), f"left in /dev/shm: {done.stderr}"  # after the line on memory, no name


@pytest.mark.matrix
@pytest.mark.releases("0.5.12.post1", "newest")
@pytest.mark.skipif(not can_be_private(), reason="needs the right to mount a /dev/shm")
def test_an_interrupted_one_leaves_nothing_in_dev_shm(release: str, plugin_wheel: Path, tmp_path: Path) -> None:
    """Interrupted while segments come and go."""
    words = command(release, plugin_wheel, "--sizes", "16M", "--n", "8", "--seconds", "600", "--json")
    # The shell ignores Ctrl-C; what it starts does not, since Python sets its own handler.
    script = 'echo $$ > "$1"; shift; exec "$@"'
    pid_file = tmp_path / "pid"
    whole = privately(["sh", "-c", LIST, "sh", "sh", "-c", script, "sh", str(pid_file), *words], 1 << 30)
    process = subprocess.Popen(
        whole,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while not list(Path(f"/proc/{process.pid}/root/dev/shm").glob("*")):
            assert process.poll() is None and time.monotonic() < deadline, "no segment was made"
            time.sleep(0.01)
        os.kill(int(pid_file.read_text()), signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert json.loads(out)["error"] == "interrupted"
    assert err.splitlines()[-1].endswith(" s"), f"left in /dev/shm: {err}"
