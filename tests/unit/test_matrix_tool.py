"""`tools.matrix`: its pieces are the whole suite, and how pieces are run and kept, with small suites of pytest."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console

from devkit.cache import cache_root
from tools import matrix
from tools.pieces import Piece, Results, read_report, run, tree_digest

RELEASE = "9.9.9"
PASSES = """
import os
def test_it():
    with open(os.environ["RAN"], "a") as ran:
        ran.write({name!r})
"""
FAILS = """
import pytest
def test_it(): assert False
def test_another(): pass
def test_skipped(): pytest.skip("not here")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken(): raise OSError("broken")
def test_error(broken): pass
"""
SKIPS = """
import pytest
def test_it(): pytest.skip("not here")
"""
HANGS = """
import os, pytest
@pytest.fixture
def server():
    yield
    with open(os.environ["RAN"], "a") as ran:
        ran.write("-stopped-")
def test_it(server):
    with open(os.environ["HANGS"], "w") as told:  # closed by nothing but this process's end
        told.write("hangs")
        told.flush()
        os.read(os.pipe()[0], 1)
"""


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the suites a and b that pass; one engine's wheel is in the cache."""
    tree = tmp_path / "tree"
    for name in ("a", "b"):
        suite(tree, name, PASSES.format(name=name))
    (tree / ".gitignore").write_text("__pycache__/\n.pytest_cache/\n")  # the user's own may not have them
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    monkeypatch.setenv("MMLANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they need none, and start in less time
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HANGS", str(tmp_path / "hangs"))
    record = cache_root() / "wheels" / RELEASE / f"sglang-{RELEASE}.dist-info" / "RECORD"
    record.parent.mkdir(parents=True)
    record.write_text("sglang/__init__.py,sha256=one,1\n")
    (cache_root() / "wheels" / RELEASE / ".mmlane-stamp").write_text(RELEASE)
    return tree


def suite(tree: Path, name: str, text: str) -> None:
    (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / name / f"test_{name}.py").write_text(text)


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=tree, check=True)


def pieces(*names: str) -> list[Piece]:
    return [Piece(name, (name,), (name,), (RELEASE,)) for name in names]


def go(tree: Path, *names: str, **options: Any) -> tuple[int, str]:
    """The exit status, and what was printed."""
    console = Console(width=400, highlight=False)
    with console.capture() as printed:
        status = matrix.go(pieces(*names), tree, Results(cache_root() / "matrix"), console, **options)
    return status, printed.get()


def row(printed: str, name: str) -> list[str]:
    """The cells of a piece in the table."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    (found,) = [cells for cells in rows if cells[0] == name]
    return found


def ran(tmp_path: Path) -> str:
    path = tmp_path / "ran"
    return path.read_text() if path.exists() else ""


def test_what_has_passed_is_not_run_again_unless_asked(tree: Path, tmp_path: Path) -> None:
    status, printed = go(tree, "a", "b")
    assert (status, ran(tmp_path)) == (0, "ab")
    assert row(printed, "a")[1:7] == ["pass", "1", "0", "0", "0", "0"]
    assert Path(row(printed, "a")[-1]).read_text().count("1 passed") == 1
    status, printed = go(tree, "a", "b")
    assert (status, ran(tmp_path)) == (0, "ab")
    assert row(printed, "b")[1:3] == ["pass, before", "1"]
    assert go(tree, "a", "b", again=True)[0] == 0
    assert ran(tmp_path) == "abab"


def test_the_minutes_at_the_end_are_of_what_ran_now(tree: Path) -> None:
    go(tree, "a")
    (kept,) = cache_root().glob("matrix/a-*.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "minutes": 60.0}))
    _, printed = go(tree, "a")
    assert row(printed, "a")[7] == "60.0"
    assert row(printed, "1 of 1")[7] == "0.0"


def test_another_tree_or_engine_is_another_result(tree: Path, tmp_path: Path) -> None:
    go(tree, "a", "b")
    (tree / "a" / "new.py").write_text("")  # not committed, as little as the rest
    go(tree, "a", "b")
    assert ran(tmp_path) == "aba"
    (tree / "a" / "new.py").unlink()
    go(tree, "a", "b")
    assert ran(tmp_path) == "aba"  # that tree had passed
    (record,) = cache_root().glob("wheels/*/*/RECORD")
    record.write_text("sglang/__init__.py,sha256=two,1\n")
    go(tree, "a", "b")
    assert ran(tmp_path) == "abaab"


def test_what_decides_a_result_has_to_be_there(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: listed as deciding"):
        Piece("a", (), ("a", "gone")).key(tree)
    before = tree_digest(tree, ["a", "b"])
    assert tree_digest(tree, ["a", "b", ":(exclude)b"]) == tree_digest(tree, ["a"]) != before
    (tree / "a" / "test_a.py").chmod(0o755)
    executable = tree_digest(tree, ["a", "b"])
    (tree / "a" / "test_a.py").unlink()  # git lists it all the same
    assert len({before, executable, tree_digest(tree, ["a", "b"])}) == 3


def test_what_the_tests_run_in_decides_the_result(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in matrix.pieces():
        assert {"requirements-test.txt", "requirements-dev.txt"} < {*piece.files}
    (piece,) = pieces("a")
    before = piece.key(tree)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert piece.key(tree) != before


def test_a_git_that_fails_is_a_line_and_the_table_still_comes(tree: Path) -> None:
    shutil.rmtree(tree / ".git")
    status, printed = go(tree, "a")
    assert (status, row(printed, "a")[1]) == (1, "not run")
    assert "a: not run: `git ls-files` failed in" in printed


def test_a_git_that_fails_after_the_run(tree: Path) -> None:
    suite(tree, "a", PASSES.format(name="a") + '    __import__("shutil").rmtree(".git")\n')
    status, printed = go(tree, "a")
    assert (status, row(printed, "a")[1]) == (0, "pass")
    assert ": the result is not kept" in printed


def test_a_piece_that_fails_does_not_stop_the_others(tree: Path, tmp_path: Path) -> None:
    suite(tree, "a", FAILS)
    status, printed = go(tree, "a", "b")
    assert (status, ran(tmp_path)) == (1, "b")
    assert row(printed, "a")[1:7] == ["fail", "1", "1", "1", "1", "1"]
    assert row(printed, "b")[1] == "pass"
    assert row(printed, "1 of 2")[2:6] == ["2", "1", "1", "1"]
    assert "skipped 1 x: not here" in printed
    status, printed = go(tree, "a", "b")
    assert (status, row(printed, "a")[1], ran(tmp_path)) == (1, "fail", "b")


def test_nothing_passed_is_no_pass(tree: Path) -> None:
    suite(tree, "a", SKIPS)
    suite(tree, "b", "")
    status, printed = go(tree, "a", "b")
    assert status == 1
    assert row(printed, "a")[1:6] == ["nothing passed", "0", "0", "0", "1"]
    assert row(printed, "b")[1:6] == ["nothing passed", "0", "0", "0", "0"]


def test_a_pytest_that_does_not_get_to_its_report(tree: Path) -> None:
    suite(tree, "a", "import os; os._exit(3)")
    status, printed = go(tree, "a", "b")
    assert (status, row(printed, "a")[1], row(printed, "b")[1]) == (1, "no report, exit status 3", "pass")


def test_half_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text("<testsuites><testsuite><testcase")
    assert read_report(tmp_path / "report.xml") is None


def test_an_engine_that_cannot_be_had(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tree))
    no_wheel, no_file = Piece("a", ("a",), ("a",), ("9.9.8",)), Piece("b", ("b",), ("gone",))
    console = Console(width=400, highlight=False)
    with console.capture() as captured:
        assert matrix.go([no_wheel, no_file], tree, Results(cache_root() / "matrix"), console) == 1
    printed = captured.get()
    assert row(printed, "a")[1] == row(printed, "b")[1] == "not run"
    assert "No matching distribution found for sglang==9.9.8" in printed
    assert "gone: listed as deciding a result, and not there" in printed


def test_a_result_is_not_kept_when_the_tree_changes_during_the_run(tree: Path, tmp_path: Path) -> None:
    suite(tree, "a", PASSES.format(name="a") + '\nopen(__file__, "a").write("#")\n')
    status, printed = go(tree, "a")
    assert status == 0
    assert "a: files changed while it ran: the result is not kept" in printed
    go(tree, "a")
    assert ran(tmp_path) == "aa"


def test_what_a_piece_writes_itself(tree: Path, tmp_path: Path) -> None:
    """It does not decide the result, but has to be there as the piece has left it."""
    suite(tree, "a", PASSES.format(name="a") + '    open("a/written", "w").write("by the test")\n')
    piece = Piece("a", ("a",), ("a", ":(exclude)a/written"), writes=("a/written",))

    def outcome() -> str:
        console = Console(width=400, highlight=False)
        with console.capture() as printed:
            matrix.go([piece], tree, Results(cache_root() / "matrix"), console)
        return row(printed.get(), "a")[1]

    assert [outcome(), outcome()] == ["pass", "pass, before"]
    (tree / "a" / "written").write_text("by hand")
    assert [outcome(), outcome()] == ["pass", "pass, before"]
    (tree / "a" / "written").unlink()
    assert [outcome(), outcome()] == ["pass", "pass, before"]
    assert ran(tmp_path) == "aaa"


def test_a_hang_ends_at_the_limit(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs")
    suite(tree, "a", HANGS)
    result = run(pieces("a")[0], tree, tmp_path / "log", limit_s=0.5)  # it never ends on its own
    assert (result.outcome, result.passed) == ("time limit", 0)


@contextmanager
def writes(process: subprocess.Popen[str], fifo: Path) -> Iterator[IO[str]]:
    """What a process or its children write into a fifo, as soon as they do; fails if it ends before that."""
    ended = os.pidfd_open(process.pid)
    try:
        with os.fdopen(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as pipe:
            ready, _, _ = select.select([pipe.fileno(), ended], [], [])
            assert pipe.fileno() in ready, f"it ended too early:\n{process.communicate()[0]}"
            os.set_blocking(pipe.fileno(), True)
            yield pipe
    finally:
        os.close(ended)


def test_waiting_for_a_process_that_ends_fails_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    process = subprocess.Popen(["echo", "no room"], stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match="no room"), writes(process, tmp_path / "fifo"):
        pass


def test_a_run_that_is_killed_keeps_what_passed(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs")
    suite(tree, "hanging", HANGS)
    code = f"""
import sys
from pathlib import Path
from tools.matrix import main
from tools.pieces import Piece
found = [Piece(name, (name,), (name,)) for name in ("a", "hanging", "b")]
sys.exit(main([], found, Path({str(tree)!r})))
"""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start()
        with writes(process, tmp_path / "hangs") as told:
            assert told.read(5) == "hangs"
            second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert "another run holds" in second.stderr
            process.send_signal(signum)
            printed, _ = process.communicate(timeout=60)
            assert told.read() == ""  # pytest is gone
        assert process.returncode == 128 + signal.SIGINT
        assert row(printed, "a")[1] in ("pass", "pass, before")
        assert [row(printed, name)[1] for name in ("hanging", "b")] == ["interrupted", "not run"]
    assert ran(tmp_path) == "a-stopped--stopped-"
    suite(tree, "hanging", PASSES.format(name="h"))
    assert start().wait(60) == 0
    assert ran(tmp_path) == "a-stopped--stopped-hb"


def test_an_unknown_piece_for_only_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--only", "0.5.9,0.5.99"])
    assert "--only 0.5.99: wanted some of contract, 0.5.9, " in capsys.readouterr().err


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache_root())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 << 30))
    with pytest.raises(SystemExit, match=r"2 engines to build .* 2\.0 GiB are free: make room"):
        matrix.room(["0.5.9", "0.5.18"])
    for made in ("base-0", "engines/0.5.9", "engines/0.5.18"):
        (cache_root() / made).mkdir(parents=True)
    assert matrix.room(["0.5.9", "0.5.18"]).startswith("0 engines to build")


def test_no_room_is_needed_where_nothing_is_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache_root())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert matrix.room([]).startswith("0 engines to build")


# --- the pieces of the real matrix --------------------------------------------------------------------------

COLLECT = """
import contextlib, json, sys
import pytest
class Collected:
    def pytest_collection_finish(self, session):
        skipped = [[mark.kwargs.get("reason", "") for mark in item.iter_markers("skip")] for item in session.items]
        self.tests = [[item.nodeid, *reasons] for item, reasons in zip(session.items, skipped)]
found = []
for arguments in json.loads(sys.argv[1]):
    collected = Collected()
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([*arguments, "--collect-only", "-q"], plugins=[collected])
    assert status == 0, arguments
    found.append(collected.tests)
print(json.dumps(found))
"""


def collected(checkout: Path, runs: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """For each run's arguments the tests that pytest would run; each with the reasons why it is skipped."""
    command = [sys.executable, "-c", COLLECT, json.dumps(runs)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[list[str]]] = json.loads(done.stdout)
    return found


def test_the_pieces_together_are_the_whole_suite(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is lost, none is run twice, none is skipped in a piece that is not in the whole."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    found = collected(
        checkout,
        [
            ["tests/contract", "tests/engine", "tests/install", "--engines", "all"],
            *(piece.arguments for piece in matrix.pieces()),
        ],
    )
    whole, *parts = ([tuple(test) for test in tests] for tests in found)
    assert Counter(test for part in parts for test in part) == Counter(whole)
    assert max(Counter(whole).values()) == 1
    assert all(parts)


def test_a_release_that_is_not_in_the_table(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    command = [sys.executable, "-m", "pytest", "tests/engine", "--all-of", "0.5.99", "--collect-only"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--all-of 0.5.99: wanted one of 0.5.9, " in done.stderr
