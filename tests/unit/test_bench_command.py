"""`mmlane bench`: real runs, with tiny payloads, of what needs no engine; and what ends it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from devkit.sharedmemory import can_be_private, privately
from mmlane.bench.case import Case
from mmlane.bench.comparing import Comparing
from mmlane.bench.need import need
from mmlane.bench.sizes import MIB
from mmlane.bench.ways import Way, on_cpu, on_device
from mmlane.cli import app
from mmlane.lane.status import running

COMMAND = (sys.executable, "-m", "mmlane", "bench")
TINY = ("--sizes", "128K", "--n", "1", "--seconds", "2")
ENDLESS = ("--sizes", "64M", "--seconds", "600", "--json")
DEADLINE = 600.0  # seconds; only a fault takes that long

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def run(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def eventually(found: Callable[[], Any], what: str) -> Any:
    """What a look finds, once it finds anything."""
    deadline = time.monotonic() + DEADLINE
    while not (it := found()):
        assert time.monotonic() < deadline, f"{what}: not so"
        time.sleep(0.01)
    return it


# --- what it prints ---


@needs_torch
def test_the_lane_is_compared_with_a_copy() -> None:
    done = run("--sizes", "128K,1M", "--n", "1,2", "--readers", "2", "--seconds", "5", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["exit_code"], found["error"], found["engine"]) == (0, None, None)
    assert found["notes"][0] == "no sglang in this Python: the lane alone is compared, with a plain copy"
    cases = [(one["bytes"], one["n"]) for one in found["comparisons"] if one["device"] == "cpu"]
    assert cases[:1] == [(128 << 10, 1)]
    assert len(cases) + sum("time was over" in line for line in found["left_out"]) == 4
    (lane,) = found["comparisons"][0]["ways"]
    assert lane["way"] == "lane-alone" and lane["problem"] is None
    assert lane["rounds"] >= 1 and 0 < lane["least_s"] <= lane["cost_s"] <= lane["most_s"]
    assert lane["over_memcpy"] == pytest.approx(lane["cost_s"] / found["comparisons"][0]["memcpy_s"])
    assert lane["over_baseline"] is None and found["comparisons"][0]["baseline"] is None
    assert "takes at most" in done.stderr


@needs_torch
def test_the_table() -> None:
    done = run(*TINY)
    assert done.returncode == 0, done.stderr
    assert "128 KiB, 2 readers" in done.stdout and "lane, without engine" in done.stdout
    assert "note: no sglang in this Python" in done.stdout
    assert "round" not in done.stderr  # a bar is for terminals


@needs_torch
def test_what_the_time_does_not_suffice_for_is_named() -> None:
    done = run("--sizes", "1M,2M", "--n", "1", "--seconds", "1", "--json")
    found = json.loads(done.stdout)
    measured = [one for one in found["comparisons"] if one["ways"][0]["rounds"]]
    assert measured and done.returncode == 0  # the first is, whatever the time
    if len(found["comparisons"]) < 2:
        assert found["left_out"] == ["2 MiB, 2 readers: the time was over"]


# --- what it needs ---


def test_too_little_memory_is_refused() -> None:
    pytest.importorskip("torch")
    done = run("--sizes", "100000G", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 1
    assert "of memory are needed at most" in found["error"] and "choose smaller --sizes" in found["error"]
    assert found["comparisons"] == [] and found["needs"]["memory"] > 100000 << 30


def test_what_is_needed_grows_with_all_that_it_depends_on() -> None:
    ways = on_cpu(engine=True)
    least = need([(Case(1, MIB), ways)])
    for case in (Case(2, MIB), Case(1, 2 * MIB), Case(1, MIB, n=2)):
        assert need([(case, ways)]).memory > least.memory
    assert need([(Case(2, MIB, n=8), ways)]).shm == 8 * MIB
    assert need([(Case(2, MIB), on_cpu(engine=False))]).shm == 0
    assert need([(Case(2, MIB), on_device("cuda:0"))]).shm == MIB


@needs_torch
@pytest.mark.skipif(not can_be_private(), reason="needs the right to mount a /dev/shm")
def test_a_small_dev_shm_leaves_out_what_does_not_fit(engine_without_parts: Mapping[str, str]) -> None:
    """As in a container: of the default sizes those that fit are measured, of chosen ones none is left out."""
    small = privately([*COMMAND, "--n", "1", "--seconds", "1", "--json"], 20 * MIB)
    env = {**os.environ, **engine_without_parts}
    done = subprocess.run(small, env=env, capture_output=True, text=True, check=False, timeout=DEADLINE)
    found = json.loads(done.stdout)
    assert found["left_out"][0] == "64 MiB: 64 MiB in /dev/shm are needed at most, and 20 MiB are free there"
    assert found["comparisons"]
    chosen = subprocess.run(
        [*small, "--sizes", "64M"], env=env, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert json.loads(chosen.stdout)["error"].startswith("64 MiB in /dev/shm are needed at most")


def answered(answer: str) -> tuple[int, str]:
    """Exit code, and what a person sees that is asked on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, *TINY], stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = ""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            part = os.read(ours, 4096)
        except OSError:  # its other end is closed
            break
        if not part:
            break
        seen += part.decode(errors="replace")
        if "Go on?" in seen and answer:
            os.write(ours, answer.encode())
            answer = ""
    os.close(ours)
    return process.wait(DEADLINE), seen


@needs_torch
def test_a_terminal_is_asked() -> None:
    code, seen = answered("n\n")
    assert code == 1 and "not measured: the answer was no" in seen
    code, seen = answered("y\n")
    assert code == 0 and "128 KiB, 2 readers: round " in seen  # the bar is drawn now and then, and at the end


# --- what lacks ---


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlane.bench.installed_torch.importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench", "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["error"].startswith("no torch: ")


def test_a_torch_that_does_not_work(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    done = run("--json", env={"PYTHONPATH": str(tmp_path)})
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 3
    assert found["error"] == "torch cannot be imported: ImportError: libcudart.so.12 is missing"


@pytest.fixture
def engine_without_parts(tmp_path: Path) -> Mapping[str, str]:
    """An engine of which nothing can be used."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "_version.py").write_text("__version__ = '0.5.12'")
    return {"PYTHONPATH": str(tmp_path)}


@needs_torch
def test_a_way_that_fails_does_not_stop_the_others(engine_without_parts: Mapping[str, str]) -> None:
    done = run(*TINY, "--json", env=engine_without_parts)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 1
    assert found["engine"] == "0.5.12"
    ways = {way["way"]: way for way in found["comparisons"][0]["ways"]}
    assert list(ways) == ["engine", "backport", "lane", "lane-alone"]
    for name in ("engine", "backport", "lane"):
        assert "ModuleNotFoundError" in ways[name]["problem"] and ways[name]["cost_s"] is None
    assert ways["lane-alone"]["problem"] is None and ways["lane-alone"]["rounds"] >= 1


@pytest.mark.skipif(find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_no_matplotlib() -> None:
    done = run("--plot", "out.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmlane: --plot needs matplotlib, which is not installed: pip install matplotlib\n"


@needs_torch
def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(*TINY, "--plot", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--sizes", "1x"), "'1x' is not a size"),
        (("--sizes", "64K"), "wanted 128 KiB or more"),
        (("--n", "0"), "wanted a number from 1 on"),
        (("--readers", "0"), "greater than or equal to 1"),
        (("--what",), "No such option"),
    ],
)
def test_wrong_options_are_json_where_that_was_asked_for(words: tuple[str, ...], why: str) -> None:
    done = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert why in found["error"] and found["exit_code"] == 2


def test_torch_is_not_imported_for_help() -> None:
    script = "import sys; from mmlane import cli; assert 'torch' not in sys.modules; print('without')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "without\n"


# --- what ends it ---


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_worker(pid: int) -> bool:
    try:
        return b"mmlane.bench.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def offspring(pid: int) -> list[int]:
    """All processes that a process has started, and those have."""
    return [one for child in children(pid) for one in [child, *offspring(child)]]


def readers(pid: int) -> list[int]:
    """The readers of a command's one way, once there are two."""
    found = [one for child in children(pid) if is_worker(child) for one in children(child) if is_worker(one)]
    return found if len(found) == 2 else []


@contextmanager
def started(*words: str, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that is ended afterwards; `scratch`: where it makes its directory."""
    process = subprocess.Popen(
        [*COMMAND, *words],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_measuring(pid: int) -> bool:
    """Whether a lane runs of a process that this one has started."""
    makers = {int(name.split("-")[1]) for name in running()}
    return not makers.isdisjoint(offspring(pid))


@needs_torch
@pytest.mark.parametrize(
    ("until", "number"),
    [(readers, signal.SIGINT), (is_measuring, signal.SIGINT), (is_measuring, signal.SIGTERM)],
    ids=["starting", "measuring", "ended while measuring"],
)
def test_an_interrupted_one_leaves_nothing(
    until: Callable[[int], Any], number: signal.Signals, tmp_path: Path
) -> None:
    with started(*ENDLESS, scratch=tmp_path) as process:
        eventually(lambda: until(process.pid), "it has come so far")
        there = offspring(process.pid)
        assert there
        process.send_signal(number)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    found = json.loads(out)
    assert (found["error"], found["exit_code"]) == ("interrupted", 130)
    eventually(lambda: not any(map(is_worker, there)), "its processes are gone")
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_killed_one_leaves_no_process(tmp_path: Path) -> None:
    with started(*ENDLESS, scratch=tmp_path) as process:
        eventually(lambda: is_measuring(process.pid), "it measures")
        there = offspring(process.pid)
        process.kill()
        process.wait()
        eventually(lambda: not any(map(is_worker, there)), "its processes are gone")


@needs_torch
def test_a_reader_that_dies_is_an_error(tmp_path: Path) -> None:
    with started(*ENDLESS, scratch=tmp_path) as process:
        first, _ = eventually(lambda: readers(process.pid), "there are readers")
        os.kill(first, signal.SIGKILL)
        out, err = process.communicate(timeout=DEADLINE)
    found = json.loads(out)
    assert process.returncode == found["exit_code"] == 1, err
    (lane,) = found["comparisons"][0]["ways"]
    assert "reader 0 ended, exit code -9" in lane["problem"] and lane["cost_s"] is None


@needs_torch
def test_a_segment_carries_as_well(tmp_path: Path) -> None:
    """What is compared on the way to a GPU, here without one."""
    way = Way("segment", "segment", "mmlane.bench.via_segment")
    comparing = Comparing([(Case(2, MIB, n=2), [way])], seconds=1, scratch=tmp_path, say=lambda _: None)
    comparing.run()
    (outcome,) = comparing.results.comparisons[0].outcomes
    assert not outcome.problem and outcome.cost_s and len(outcome.memcpy_s) == len(outcome.cost_s)
