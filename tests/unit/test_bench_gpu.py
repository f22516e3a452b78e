"""The GPU benchmark without a GPU: its rehearsal, what it says where it cannot run, what it makes of figures."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bench.gpu.device import lacking
from bench.gpu.measures import CONCURRENT, FIRST_BYTE, H2D, IMAGES, MEASURES, Plan
from bench.gpu.records import REHEARSAL, Results, goals
from bench.gpu.report import grids
from bench.gpu.ways import LANE_PINNED, PAGEABLE, SEGMENTS, TORCH_PINNED
from bench.harness.results import Record
from bench.harness.spawned import interrupts_held

CHECKOUT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bench.gpu"]
SHM = Path("/dev/shm")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a rehearsal's files are, and what it printed."""
    out = tmp_path_factory.mktemp("rehearsal")
    done = run("--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    left = [name.name for name in SHM.glob(f"{SEGMENTS}_*")]
    assert not [name for name in left if not Path("/proc", name.split("_")[-2]).exists()]
    return out, done.stdout


def test_a_rehearsal_has_every_case_and_way(rehearsed: tuple[Path, str]) -> None:
    results = Results.load(rehearsed[0] / "gpu-rehearsal.json")
    plan = Plan([]).rehearsal()
    assert {(r.status, r.reason) for r in results.records} == {("ok", None)}
    cases = {measure: {case: results.of(measure, case) for case in results.cases(measure)} for measure in MEASURES}
    counts = dict(zip(MEASURES, (1, len(plan.sizes), len(plan.processes), 1, 2), strict=True))
    assert {measure: len(of_case) for measure, of_case in cases.items()} == counts
    for measure, ways in (("h2d", H2D), ("concurrent", CONCURRENT), ("first byte", FIRST_BYTE)):
        assert {tuple(r.way for r in of_case) for of_case in cases[measure].values()} == {ways}
    for record in results.records:
        first = next(iter(record.figures.values()))
        assert len(first) >= (plan.fresh if record.group == "contexts" else plan.rounds)
        assert record.group == "contexts" or min(first) > 0


def test_a_rehearsal_says_so_everywhere_and_compares_nothing(rehearsed: tuple[Path, str]) -> None:
    out, printed = rehearsed
    for text in (printed, (out / "gpu-rehearsal.md").read_text()):
        assert text.count(REHEARSAL) > len(MEASURES)
        assert "| x " not in text and "│ x " not in text
        assert " met " not in text and "MISSED" not in text
    results = Results.load(out / "gpu-rehearsal.json")
    assert results.note == REHEARSAL
    assert {results.ratio(record, record.way) for record in results.records} == {None}
    assert all(REHEARSAL in grid.title for grid in grids(results))


def made_up(pinned: float, lane: float, pageable: float, note: str = "") -> Results:
    """h2d at 256 MiB, in GB/s."""
    rates = {TORCH_PINNED: pinned, LANE_PINNED: lane, PAGEABLE: pageable}
    records = [
        Record("h2d", "256 MiB", way, figures={"GB/s": [rate - 1, rate, rate + 7]}) for way, rate in rates.items()
    ]
    return Results({}, records, note)


@pytest.mark.parametrize(
    ("lane", "pageable", "verdicts"),
    [
        (45.0, 20.0, ["met", "met"]),
        (44.0, 20.0, ["MISSED", "met"]),
        (49.0, 25.0, ["met", "MISSED"]),
        (10.0, 20.0, ["MISSED", "MISSED"]),
    ],
)
def test_goals_are_met_or_missed(lane: float, pageable: float, verdicts: list[str]) -> None:
    results = made_up(50.0, lane, pageable)
    assert [goal.verdict for goal in goals(results)] == verdicts
    *_, table = grids(results)
    assert [row[-1] for row in table.rows] == verdicts


def test_goals_without_figures() -> None:
    for results in (Results(), made_up(50.0, 50.0, 10.0, note=REHEARSAL)):
        assert [goal.verdict for goal in goals(results)] == ["not measured", "not measured"]


def test_ratios_and_skips_in_tables() -> None:
    results = made_up(50.0, 45.0, 20.0)
    results.records.append(Record("h2d", "256 MiB", "shared", status="skipped", reason="no room\nat all"))
    table, _ = grids(results)
    assert table.headings == ("case", "way", "GB/s", "x torch pinned", "x pageable")
    assert table.rows[1] == ["256 MiB", LANE_PINNED, "45 (44 - 52)", "0.90", "2.25"]
    assert table.rows[3] == ["256 MiB", "shared: skipped, no room", "", "", ""]


def test_the_images() -> None:
    assert IMAGES.shape == (4784, 1176)
    assert IMAGES.nbytes == 720_125_952


def test_missing_requirements_are_named() -> None:
    built_without = lacking(None, torch_version="2.13.0+cpu", cuda=None)
    assert built_without is not None
    assert built_without.startswith(
        "no CUDA device: torch 2.13.0+cpu was built without CUDA; wanted: one at least;"
    )
    none = lacking(None, torch_version="2.13.0", cuda="12.8", found=0)
    assert none is not None and "found: 0" in none and "nvidia-smi" in none
    few = lacking([0, 1], torch_version="2.13.0", cuda="12.8", found=1)
    assert few is not None and few.startswith("too few CUDA devices: wanted: devices 0, 1; found: 1")
    assert lacking([0, 1], cuda="12.8", found=2) is None
    assert lacking(None, cuda="12.8", found=1) is None


@pytest.mark.skipif(lacking(None) is None, reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"skipped: {lacking(None)}\n"
    assert not out.exists()


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    command = [*COMMAND, "--rehearse", "--out", str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("contexts")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            printed, errors = process.communicate(
                timeout=60
            )  # until the last process that has the pipes has ended
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert "interrupted" in printed and "Goals" in printed
    assert (process.returncode, errors) == (0, "")


def test_no_process_is_interrupted_while_it_starts_though_another_thread_takes_the_signal() -> None:
    """A signal that one thread blocks goes to another; Python's handlers run in the main thread all the same."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    taken, takes = socket.socketpair()
    takes.setblocking(False)
    wakeup = signal.set_wakeup_fd(takes.fileno())
    held = False
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_held():
            assert other.ident is not None
            signal.pthread_kill(other.ident, signal.SIGINT)
            assert taken.recv(1) == bytes([signal.SIGINT])  # the other thread has
            held = True
        assert held
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.set_wakeup_fd(wakeup)
        taken.close()
        takes.close()
        over.set()
        other.join()
        signal.signal(signal.SIGINT, before)
