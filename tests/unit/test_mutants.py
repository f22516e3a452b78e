"""`make mutants`: what is changed, and that a run of tests is of the changed code."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("cosmic_ray", reason="not among what the tests need on every Python")

from cosmic_ray.mutating import mutate_code

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
