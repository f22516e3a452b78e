"""`ipc_lock`: where the lock file goes, and who can get at it. The engine's side is in tests/engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmlane_patches.ipc_lock import NAME, VARIABLE, PrivateLock, private_lock

ENGINES = "/tmp/shm_wr_lock.lock"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where it may go, in this order: a directory each in an otherwise empty world."""
    found = {"TMPDIR": "tmp", "XDG_RUNTIME_DIR": "run", "HOME": "home"}
    for variable, name in found.items():
        (tmp_path / name).mkdir(mode=0o755)
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    for variable in ("MMLANE_CACHE", VARIABLE):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    return [
        tmp_path / "tmp" / f"mmlane-{os.geteuid()}",
        tmp_path / "run" / "mmlane",
        tmp_path / "home" / ".cache" / "mmlane" / "lock",
    ]


def test_the_first_place(places: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    lock = private_lock(ENGINES)
    assert os.fspath(lock) == str(lock) == os.environ[VARIABLE] == str(places[0] / NAME)
    assert places[0].stat().st_mode & 0o777 == 0o700
    with open(lock, "a") as opened:  # noqa: PTH123 - as the engine does
        assert opened.name == str(places[0] / NAME)
    assert not any(place.exists() for place in places[1:])
    assert capsys.readouterr().err == ""


def test_a_directory_for_caches(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLANE_CACHE", str(tmp_path / "cache"))
    for place in places[:2]:
        place.touch()
    assert os.fspath(private_lock(ENGINES)) == str(tmp_path / "cache" / "lock" / NAME)


def a_link(place: Path) -> None:
    elsewhere = place.parent.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.symlink_to(elsewhere)


def a_file(place: Path) -> None:
    place.touch(mode=0o700)


def open_to_others(place: Path) -> None:
    place.mkdir(mode=0o750)


def of_another_user(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user")
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)


def below_what_others_may_change(place: Path) -> None:
    place.parent.chmod(0o777)


def below_another_users(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user")
    os.chown(place.parent, 12345, 12345)


TAKEN = [a_link, a_file, open_to_others, of_another_user, below_what_others_may_change, below_another_users]


@pytest.mark.parametrize("taken", TAKEN)
def test_a_place_that_is_taken_is_passed_over(taken: Callable[[Path], None], places: list[Path]) -> None:
    taken(places[0])
    assert os.fspath(private_lock(ENGINES)) == str(places[1] / NAME)


def test_a_sticky_directory_will_do(places: list[Path]) -> None:
    places[0].parent.chmod(0o1777)
    assert os.fspath(private_lock(ENGINES)) == str(places[0] / NAME)


def test_no_place(places: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's own is kept, which is said once for all processes of the engine, whatever they would find."""
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    assert private_lock(ENGINES) == ENGINES
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmlane: wanted a directory that is ours alone for a lock file, found none (")
    assert all(str(place) in line for place in places)
    assert line.endswith("silence this with MMLANE_DISABLE=ipc_lock")
    places[0].unlink()
    assert private_lock(ENGINES) == ENGINES
    assert capsys.readouterr().err == ""


def test_children_use_what_the_first_has_found(places: list[Path]) -> None:
    """Also where a better place has come up since."""
    places[0].touch()
    private_lock(ENGINES)
    places[0].unlink()
    code = f"import os; from mmlane_patches.ipc_lock import *; print(os.fspath(private_lock({ENGINES!r})))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == f"{places[1] / NAME}\n"
    assert not places[0].exists()


def test_what_a_process_of_another_user_has_found_is_not_ours(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    of_another_user(theirs)
    monkeypatch.setenv(VARIABLE, str(theirs / NAME))
    assert os.fspath(private_lock(ENGINES)) == os.environ[VARIABLE] == str(places[0] / NAME)


def test_a_directory_that_was_cleaned_away_is_made_again(places: list[Path]) -> None:
    lock = private_lock(ENGINES)
    places[0].rmdir()
    assert Path(os.fspath(lock)).parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_was_changed_is_not_used(places: list[Path]) -> None:
    lock = private_lock(ENGINES)
    assert isinstance(lock, PrivateLock)
    places[0].chmod(0o777)
    with pytest.raises(PermissionError, match=r"is open to others \(mode 0777\)"):
        os.fspath(lock)
