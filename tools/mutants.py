"""`python -m tools.mutants [MODULE ...]`: change the lane in one place after another, and list what no test minds.

cosmic-ray makes the changes (mutants), in a copy of the checkout in the cache, and keeps the results. As long as
the module and its tests are the same, the next run tries what has not been tried, then again what took too long,
since the machine may have been busy. Ours are the choice of changes, and how tests start: in a fork of this
process, which has imported torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import parso
import pytest
import torch
from cosmic_ray import plugins
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from devkit.cache import cache_root, digest, locked

CHECKOUT = Path(__file__).resolve().parent.parent
LANE = Path("plugin/mmlane/lane")
OURS = ("mmlane", "mmlane_patches", "tests", "devkit", "tools")  # packages that a test run reads from the copy

# The tests that should fail when a module is changed, the quickest first; for others, all tests of the lane.
TESTS = {
    "allocator": ("tests/lane/test_allocator.py", "tests/lane/test_bookkeeping.py"),
    "bookkeeping": ("tests/lane/test_bookkeeping.py",),
    "ticket": ("tests/lane/test_ticket.py",),
    "protocol": ("tests/lane/test_protocol.py",),
    "status": ("tests/unit/test_status_command.py", "tests/lane/test_status.py"),
}

# cosmic-ray has every operator become every other one; these find the same gaps in a fifth of the time.
WANTED = re.compile(
    r"ours/.*|core/(AddNot|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop)"
    r"|core/Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd|BreakWithContinue|ContinueWithBreak)"
    r"|core/ReplaceUnaryOperator_.*"
    r"|core/ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|FloorDiv_Mul|Mod_FloorDiv|RShift_LShift|LShift_RShift"
    r"|BitOr_BitAnd|BitAnd_BitOr)"
    r"|core/ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is"
    r"|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt)"
)


class RemoveStatement:
    """A kind of change that cosmic-ray lacks: one statement of a function does nothing."""

    KINDS = ("expr_stmt", "atom_expr", "del_stmt", "raise_stmt")

    @staticmethod
    def arguments() -> tuple[()]:
        return ()

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Where the statements are; `return` alone goes too."""
        if node.type != "simple_stmt" or node.search_ancestor("funcdef") is None:
            return
        (what, *_) = node.children
        if what.type in self.KINDS or (what.type == "keyword" and what.value == "return"):
            yield what.start_pos, what.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        nothing: Any = parso.parse(f"{node.get_first_leaf().prefix}pass\n")  # type: ignore[no-untyped-call]
        return nothing


plugins.OPERATOR_PROVIDERS["ours"] = {"RemoveStatement": RemoveStatement}


class SameExamples:
    """A pytest plugin: hypothesis gives the same examples each time, and does not make one smaller that fails."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        kept = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=kept)
        hypothesis.settings.load_profile("mutants")


# --- one run of tests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How a run of tests ended: `code` is pytest's exit code, None when it took too long."""

    code: int | None
    seconds: float
    output: str


def run_tests(copy: Path, tests: tuple[str, ...], timeout: float) -> Run:
    """Run tests of a copy of the checkout in a fork of this process."""
    began, log = time.monotonic(), copy / "tests.log"
    pid = os.fork()
    if pid == 0:
        _become_a_test_run(copy, tests, log)
    process = os.pidfd_open(pid)
    try:
        ended = bool(select.select([process], [], [], timeout)[0])
    finally:
        os.close(process)
        os.killpg(pid, signal.SIGKILL)  # what it has started, and it if it takes too long
        status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status) if ended else None
    return Run(code, time.monotonic() - began, log.read_text(errors="replace")[-2000:])


def _become_a_test_run(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    """In the fork: forget this checkout's modules, and run tests of the copy. Does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ImportWatch"]
        path = [str(copy / "plugin"), str(copy / "patches"), str(copy)]
        sys.path[:] = [*path, *(place for place in sys.path if place and Path(place) != CHECKOUT)]
        os.environ.update(PYTHONPATH=os.pathsep.join(path), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        os.chdir(copy)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", f"--rootdir={copy}"]
        code = int(pytest.main([*options, *tests], plugins=[SameExamples()]))
    finally:
        sys.stdout.flush()
        os._exit(code)


# --- one module --------------------------------------------------------------------------------------------


def mutants(module: str, copy: Path, database: WorkDB) -> None:
    """Write down what is to be tried."""
    path = copy / LANE / f"{module}.py"
    init([path], database, {})
    source = path.read_text()
    inert = annotated(source)
    for item in database.work_items:
        (mutation,) = item.mutations
        wanted = WANTED.fullmatch(mutation.operator_name) and not inert(tuple(mutation.start_pos))
        if not wanted or not _possible(source, mutation):
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def _possible(source: str, mutation: Any) -> bool:
    """Whether cosmic-ray can make a change that it proposes: not where `except` names an attribute of a module."""
    try:
        mutate_code(source, plugins.get_operator(mutation.operator_name)(), mutation.occurrence)
    except AttributeError:
        return False
    return True


def annotated(source: str) -> Callable[[tuple[int, ...]], bool]:
    """Whether a place (line, column) is in an annotation, which does nothing."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                ranges.append(((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)))
    return lambda place: any(start <= place < end for start, end in ranges)


_OUTCOMES = {0: TestOutcome.SURVIVED, None: TestOutcome.INCOMPETENT}


def try_out(item: WorkItem, copy: Path, tests: tuple[str, ...], timeout: float) -> WorkResult:
    """Make one change and run the tests. INCOMPETENT: they took too long."""
    (mutation,) = item.mutations
    operator = plugins.get_operator(mutation.operator_name)()
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        done = run_tests(copy, tests, timeout)
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2)
    return WorkResult(
        worker_outcome=WorkerOutcome.NORMAL,
        test_outcome=_OUTCOMES.get(done.code, TestOutcome.KILLED),
        output=done.output,
        diff="\n".join(list(diff)[2:]),
    )


def try_all(module: str, copy: Path, database: WorkDB, until: float) -> None:
    """Try what has not been tried, in random order, then what took too long."""
    tests = tests_of(module)
    usual = run_tests(copy, tests, timeout=3600)
    if usual.code != 0:
        raise SystemExit(f"{module}: {' '.join(tests)} fail on the copy as it is:\n{usual.output}")
    late = [item for item, result in database.completed_work_items if result.test_outcome == _OUTCOMES[None]]
    todo = [*database.pending_work_items, *late]
    for number, item in enumerate(todo):
        if time.monotonic() > until:
            print(f"\n{module}: the time is over, {len(todo) - number} not tried")
            break
        database.set_result(item.job_id, try_out(item, copy, tests, timeout=30 + 3 * usual.seconds))
        print(f"\r{module}: {number + 1} of {len(todo)}", end="", flush=True)
    print()


def report(module: str, database: WorkDB, file: Path) -> None:
    """The share killed; the changes that survived, as diffs; then those with which the tests took too long."""
    tried = [(i, r) for i, r in database.completed_work_items if r.worker_outcome == WorkerOutcome.NORMAL]
    left = len(database.pending_work_items)
    by_outcome: dict[Any, list[tuple[Any, WorkResult]]] = {outcome: [] for outcome in TestOutcome}
    for item, result in tried:
        by_outcome[result.test_outcome].append((item.mutations[0], result))
    killed, survived, late = (len(by_outcome[one]) for one in (TestOutcome.KILLED, *_OUTCOMES.values()))
    share = f"{100 * killed / len(tried):.1f} %" if tried else "none"
    counts = f"{survived} survived, {late} took too long, {left} not tried"
    lines = [f"{module}: {killed} of {len(tried)} killed ({share}), {counts}"]
    for outcome, word in zip(_OUTCOMES.values(), ("survived", "took too long"), strict=True):
        for mutation, result in sorted(by_outcome[outcome], key=lambda found: tuple(found[0].start_pos)):
            line, _ = mutation.start_pos
            where = f"{module}.py:{line} {mutation.operator_name} in {mutation.definition_name}"
            lines += ["", f"{word}: {where}", result.diff or ""]
    file.write_text("\n".join(lines) + "\n")
    print(f"{lines[0]}; see {file}")


def tests_of(module: str) -> tuple[str, ...]:
    """Files or directories of tests, as pytest takes them."""
    return TESTS.get(module, ("tests/lane",))


def made_from(module: str, checkout: Path = CHECKOUT) -> str:
    """A hash of what decides the results of a module: itself, its tests, and which changes are made."""
    tests = tests_of(module)
    files = {checkout / LANE / f"{module}.py", *files_of(tests, checkout)}
    sources = [part for path in sorted(files) for part in (str(path.relative_to(checkout)), path.read_bytes())]
    changes = [WANTED.pattern, inspect.getsource(RemoveStatement), version("cosmic-ray")]
    return digest(*tests, *changes, *sources)


def files_of(tests: Sequence[str], checkout: Path) -> set[Path]:
    """The files of these tests, and what they import below tests/, conftest.py and __init__.py included."""
    found: set[Path] = set()
    todo = [checkout / test for test in tests]
    todo += [path for test in tests for path in (checkout / test).rglob("*.py")]  # of a directory
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        above = [parent for parent in path.parents if parent.is_relative_to(checkout / "tests")]
        todo += [parent / name for parent in above for name in ("conftest.py", "__init__.py")]
        imported = [checkout / name.replace(".", "/") for name in _imported(path)]
        todo += [*(path.with_suffix(".py") for path in imported), *(path / "__init__.py" for path in imported)]
    return found


def _imported(path: Path) -> Iterator[str]:
    """Names that may be modules below tests/, of all that a file imports."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith("tests."))


def copied(copy: Path) -> None:
    """Make the copy anew, so that no change of a run that was cut off is left in it."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "out"))


def main() -> None:
    modules = sorted(path.stem for path in (CHECKOUT / LANE).glob("*.py") if path.stem != "__init__")
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", default=modules, metavar="MODULE", help=", ".join(modules))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after that time")
    chosen = parser.parse_args()
    for module in chosen.modules:
        if module not in modules:
            parser.error(f"no module {module} in {LANE}; there are: {', '.join(modules)}")
    until = time.monotonic() + 60 * chosen.minutes
    torch.set_num_threads(1)  # this process forks
    root = cache_root() / "mutants"
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for module in chosen.modules:
            copied(root / "checkout")
            with use_db(root / f"{module}-{made_from(module)}.sqlite") as database:
                if not database.num_work_items:
                    mutants(module, root / "checkout", database)
                try_all(module, root / "checkout", database, until)
                report(module, database, root / f"{module}.txt")


if __name__ == "__main__":
    main()
