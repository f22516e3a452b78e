"""However mmlane was installed: the doctor says what an engine gets, and uninstalling leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mmlane import __version__
from tests.install.agreement import about_the_hook, agree, doctor, start
from tests.install.environments import AS_NOBODY, QUICK, WAYS, OnPython, OtherUser, Place, Way, original
from tools.pythons import VERSIONS, interpreter

MakePlace = Callable[..., Place]


def goes_in_and_out(way: Way) -> None:
    """Install, compare, uninstall."""
    before = way.files()
    way.install()
    found = doctor(way, code=0 if way.has_hook else 1)
    assert found["mmlane"] == __version__
    assert (about_the_hook(found) == []) == way.has_hook
    agree(found, start(way))
    assert start(way, MMLANE="off") is None
    way.uninstall()
    assert way.files() == before
    gone = way.run("-c", "import mmlane")
    assert "No module named 'mmlane'" in gone.stderr
    silent = way.run("-c", "")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in WAYS]
)
def test_a_way_to_install(name: str, place: MakePlace) -> None:
    goes_in_and_out(WAYS[name](place()))


@pytest.mark.matrix
@pytest.mark.parametrize("python_version", VERSIONS)
def test_another_python(python_version: str, place: MakePlace) -> None:
    found = interpreter(python_version)
    if found is None:
        pytest.skip(f"no Python {python_version} on this machine")
    goes_in_and_out(OnPython(place(), found))


@pytest.fixture
def open_to_all(place: MakePlace) -> Iterator[Place]:
    """A place that every user can read, with copies of what is below it."""
    made = place()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        below = []
        for number, source in enumerate(made.below):
            below.append(root / str(number))
            shutil.copytree(source, below[-1])
        (root / "place").mkdir()
        yield replace(made, root=root / "place", below=tuple(below))


@pytest.mark.matrix
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a command as another user")
def test_another_user_who_may_not_write_there(open_to_all: Place) -> None:
    candidates = [original(Path(sys.executable)), *Path("/usr/bin").glob("python3.1[0-9]")]
    for candidate in candidates:
        if subprocess.run([*AS_NOBODY, candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no Python here that every user may run")
    way = OtherUser(open_to_all, candidate)
    refused = way.run("-c", f"open({str(way.packages() / 'x')!r}, 'w')")
    assert "PermissionError" in refused.stderr
    goes_in_and_out(way)
