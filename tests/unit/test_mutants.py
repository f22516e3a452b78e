"""`make mutants`: what is changed, and that a run of tests is of the changed code."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("cosmic_ray", reason="not among what the tests need on every Python")

from cosmic_ray import work_item
from cosmic_ray.mutating import mutate_code
from cosmic_ray.work_db import use_db

from tests.lane.harness import child
from tools import mutants

SOURCE = """
LIMIT: int | None = None
class Books:
    def take(self, what: str | None) -> str | None:
        '''Docstring.'''
        if what is None:
            return
        self.taken.append(what)
        return what
"""


def without(number: int) -> str | None:
    code: str | None = mutate_code(SOURCE, mutants.RemoveStatement(), number)
    return code


def test_one_statement_of_a_function_does_nothing() -> None:
    assert without(0) == SOURCE.replace("            return\n", "            pass\n")
    assert without(1) == SOURCE.replace("self.taken.append(what)", "pass")
    assert without(2) is None  # neither a docstring, nor a result, nor what a module does at its import


def test_annotations_are_no_place_for_a_change() -> None:
    inert = mutants.annotated(SOURCE)
    lines = SOURCE.splitlines()
    for line, text, expected in ((2, "|", True), (2, "None =", True), (4, "| None)", True), (6, "is", False)):
        assert inert((line, lines[line - 1].index(text))) == expected
    assert not inert((2, lines[1].rindex("None")))


def codes(copy: Path, *conditions: str, timeout: float) -> list[int | None]:
    """How runs of a test end that looks at a copy of `mmlane`, changed before each."""
    package = copy / "plugin" / "mmlane"
    package.mkdir(parents=True)
    (copy / "test_it.py").write_text(
        "import mmlane, signal\ndef test_it(): assert mmlane.condition() if mmlane.condition else signal.pause()\n"
    )
    found = []
    for condition in conditions:
        (package / "__init__.py").write_text(f"condition = {condition}\n")
        found.append(mutants.run_tests(copy, ("test_it.py",), timeout).code)
    return found


def test_a_run_of_tests_reads_the_copy(tmp_path: Path) -> None:
    """Though this process has modules of the same names."""
    conditions = ("lambda: True", "lambda: False", "lambda: True")
    assert child.run(partial(codes, timeout=60), tmp_path, *conditions) == [0, 1, 0]


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    assert child.run(partial(codes, timeout=0.5), tmp_path, "None") == [None]


def test_results_hold_for_one_module_its_tests_and_what_they_import(tmp_path: Path, checkout: Path) -> None:
    shutil.copytree(checkout / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(checkout / mutants.LANE, tmp_path / mutants.LANE)
    before = mutants.made_from("allocator", tmp_path)
    assert before == mutants.made_from("allocator", checkout)
    for changed, counts in (
        ("plugin/mmlane/lane/allocator.py", True),
        ("tests/lane/test_allocator.py", True),
        ("tests/lane/harness/breakpoints.py", True),  # by way of the conftest.py beside the tests
        ("tests/lane/harness/sockets.py", False),
    ):
        text = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text(text + "\n")
        assert (mutants.made_from("allocator", tmp_path) != before) == counts, changed
        (tmp_path / changed).write_text(text)
    (tmp_path / "tests" / "lane" / "test_ring.py").write_text("")
    assert mutants.made_from("allocator", tmp_path) == before
    # That one has all tests of the lane.
    assert mutants.made_from("reader", tmp_path) != mutants.made_from("reader", checkout)


def test_what_took_too_long_is_no_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = (work_item.TestOutcome.KILLED, work_item.TestOutcome.SURVIVED, work_item.TestOutcome.INCOMPETENT)
    with use_db(tmp_path / "results.sqlite") as database:
        for line, outcome in enumerate(outcomes, 1):
            change = work_item.MutationSpec("allocator.py", "core/AddNot", 0, (line, 0), (line, 1))
            database.add_work_item(work_item.WorkItem.single(str(line), change))
            database.set_result(
                str(line), work_item.WorkResult(work_item.WorkerOutcome.NORMAL, "", outcome, f"diff of {line}")
            )
        mutants.report("allocator", database, tmp_path / "allocator.txt")
    counts = "allocator: 1 of 3 killed (33.3 %), 1 survived, 1 took too long, 0 not tried"
    assert capsys.readouterr().out.startswith(counts)
    survived, late = (tmp_path / "allocator.txt").read_text().split("\n\n")[1:]
    assert survived == "survived: allocator.py:2 core/AddNot in None\ndiff of 2"
    assert late == "took too long: allocator.py:3 core/AddNot in None\ndiff of 3\n"
