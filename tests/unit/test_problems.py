"""Every problem that the doctor or a report shows ends with the command, or the setting, that solves it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

from mmlane import entry, host, settings
from mmlane.cli import checks, lane_size
from mmlane.cli.triggers import Triggers
from mmlane.engine import Engine
from mmlane.patching import Patcher
from mmlane.problem import Problem

PLUGIN = Path(__file__).parents[2] / "plugin" / "mmlane"
MIB = 1 << 20

# What a person can do: a command for a shell, or a setting.
FORMS = (
    rf"{re.escape(sys.executable)} (-S )?-m mmlane serve",
    rf"{re.escape(sys.executable)} -m pip (install|uninstall) [\w.-]+",
    rf"{re.escape(sys.executable)} -m pip install --force-reinstall sglang-mmlane",
    r"mkdir -p /dev/shm && mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
    r"mount -o remount,rw /dev/shm",
    r"chmod 1777 /dev/shm",
    r"unset MMLANE_CAPACITY_MB",
    r"MMLANE_CAPACITY_MB=\d+",
    r"MMLANE=(off|backport)",
    r"MMLANE_DISABLE=[\w,]+",
)

Place = tuple[str, int]


def places() -> set[Place]:
    """Each place in the plugin's code where a problem is made: file, and first line of the call."""
    return {
        (str(file), node.lineno)
        for file in PLUGIN.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem"
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[Place, list[Problem]]:
    """The problems that are made from now on, by place."""
    found: dict[Place, list[Problem]] = {}
    init = Problem.__init__

    def noting_init(self: Problem, what: str, command: str) -> None:
        init(self, what, command)
        frame = sys._getframe(1)
        found.setdefault((frame.f_code.co_filename, frame.f_lineno), []).append(self)

    monkeypatch.setattr(Problem, "__init__", noting_init)
    return found


def session(version: str = "0.5.12", **environ: str) -> entry.Session:
    return entry.Session(settings.read(environ), Engine(Version(version), None), "test")


SHM = host.SharedMemory(path=Path("/dev/shm"), total=MIB, free=MIB, writable=True, read_only=False, segments=())
FOUND = Triggers(start_file=Path("mmlane.pth"), ran=True, entry_point="mmlane.entry:register")


def machine(shm: host.SharedMemory | None = SHM, triggers: Triggers = FOUND) -> checks.Machine:
    return checks.Machine(triggers, shm, host.Memory(MIB, None, None, MIB), (), gpu=False)


def problems_of(machine: checks.Machine) -> list[Problem]:
    return checks.Checks(settings.Settings(), session().report(), None, machine).problems()


class Broken:
    """The entry point of a package whose patches cannot be loaded."""

    name, dist = "theirs", None

    def load(self) -> object:
        raise RuntimeError("mine")


def scenarios(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """Each way to a problem."""
    yield problems_of(machine(shm=None))
    yield problems_of(machine(shm=replace(SHM, read_only=True, writable=False)))
    yield problems_of(machine(shm=replace(SHM, writable=False)))
    yield problems_of(machine(triggers=replace(FOUND, no_site=True)))
    yield problems_of(machine(triggers=replace(FOUND, start_file=None)))
    yield problems_of(machine(triggers=replace(FOUND, ran=False)))
    yield checks.Checks(settings.Settings(), None, None, None).problems()
    yield session("0.5.8").report().trouble()
    skipping = session()
    skipping.patcher.decisions["lane"].state = "skipped"
    yield skipping.report().trouble()
    with monkeypatch.context() as patch:
        taken_out = session()
        lane = taken_out.patcher.decisions["lane"]
        theirs = SimpleNamespace(target=SimpleNamespace(path="A"), in_force=lambda: False, successor=lambda: "B")
        patch.setattr(lane, "replaced", [theirs])
        patch.setattr(Patcher, "standing", lambda self, state: [lane])
        yield taken_out.report().trouble()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.entry_points", lambda group: [Broken()])
        yield session().report().trouble()
    yield from too_large(monkeypatch)


def too_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """A lane of a size that cannot be had, where the most is `most` MiB, and a quarter of the memory is 2 GiB."""
    memory = host.Memory(total=8 << 30, limit=None, used=None, available=8 << 30)
    size = {"MMLANE_CAPACITY_MB": "9999"}
    for most, environ in ((4096, size), (1024, size), (1024, {}), (1, {})):
        with monkeypatch.context() as patch:
            patch.setattr(host, "room_problem", lambda nbytes, most=most: "full" if nbytes > most * MIB else "")
            yield lane_size.problems(settings.read(environ), memory)


def test_every_problem_ends_with_what_solves_it(
    made: dict[Place, list[Problem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new place in the code that makes one needs a scenario here."""
    for problems in scenarios(monkeypatch):
        (problem,) = problems
        assert any(re.fullmatch(form, problem.command) for form in FORMS), problem
        assert str(problem) == f"{problem.what} {problem.command}"
        assert re.search(r"(:|with|set)$", problem.what), problem
    assert made.keys() == places()


def test_a_size_that_is_proposed_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [problem.command for (problem,) in too_large(monkeypatch)]
    assert commands == [
        "unset MMLANE_CAPACITY_MB",
        "MMLANE_CAPACITY_MB=1024",
        "MMLANE_CAPACITY_MB=1024",
        "MMLANE=backport",
    ]
