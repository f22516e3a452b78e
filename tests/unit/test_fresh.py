"""`tools/fresh`, in a small repository whose `make demo` and `make test` tell what they were given."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from devkit.sharedmemory import can_be_private, privately

MAKEFILE = """
demo:
	env > ../demo-env
	cat file
test:
	test -e $(HOME) -a ! -e $(HOME)/.cache
	{command}
"""


IN_DEV_SHM = "left in /dev/shm, where other programs of this machine count, too"
looks_at_dev_shm = pytest.mark.skipif(
    not can_be_private(),
    reason="what other tests have in /dev/shm counts as left: needs the right to make mount namespaces",
)


@pytest.fixture
def repository(tmp_path: Path, checkout: Path) -> Path:
    top = tmp_path / "repository"
    (top / "tools").mkdir(parents=True)
    shutil.copy(checkout / "tools" / "fresh", top / "tools" / "fresh")
    (top / "file").write_text("committed\n")
    return top


def commit(top: Path, command: str) -> None:
    (top / "Makefile").write_text(MAKEFILE.format(command=command))
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], [*named, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=top, check=True)


def fresh(top: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [str(top / "tools" / "fresh"), *words]
    if can_be_private():
        command = privately(command, 1 << 20)
    env = {**os.environ, **environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


@looks_at_dev_shm
def test_what_the_commands_see(repository: Path, tmp_path: Path) -> None:
    commit(repository, "true")
    (repository / "file").write_text("changed\n")
    place = tmp_path / "place"
    given = {"PIP_FIND_LINKS": "/wheels", "Https_Proxy": "http://proxy", "MMLANE": "off", "PYTHONPATH": "/x"}
    done = fresh(repository, str(place), **given)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = dict(line.split("=", 1) for line in (place / "demo-env").read_text().splitlines() if "=" in line)
    assert seen["HOME"] == str(place / "home")
    assert (seen["PIP_FIND_LINKS"], seen["Https_Proxy"]) == ("/wheels", "http://proxy")
    assert not {"MMLANE", "PYTHONPATH", "VIRTUAL_ENV", "MMLANE_CACHE"} & set(seen)
    assert "not committed:\n M file\n" in done.stdout
    assert (place / "make-demo.log").read_text().endswith("committed\n")
    assert re.search(r"^make demo: exit status 0 after \d+:\d\d minutes$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f"{IN_DEV_SHM}: nothing\nleft processes: none\n")


@looks_at_dev_shm
def test_a_directory_of_its_own_is_removed_if_all_went_well(repository: Path, tmp_path: Path) -> None:
    commit(repository, "true")
    assert fresh(repository, HOME=str(tmp_path)).returncode == 0
    assert not list(tmp_path.glob("mmlane-fresh-*"))


def test_a_command_that_fails(repository: Path, tmp_path: Path) -> None:
    commit(repository, "echo it broke; exit 1")
    done = fresh(repository, HOME=str(tmp_path))
    assert done.returncode == 1
    assert "\nit broke\n" in done.stdout
    assert "make test: exit status 2 after" in done.stdout
    (place,) = tmp_path.glob("mmlane-fresh-*")
    assert done.stdout.endswith(f"kept: {place}\n")


@looks_at_dev_shm
def test_what_is_left_behind(repository: Path, tmp_path: Path) -> None:
    left = Path("/dev/shm") / f"mmlane-fresh-{os.getpid()}"
    commit(repository, f"touch {left}; (cd /; exec sleep 1000 >/dev/null 2>&1) & echo $$! > ../left")
    try:
        done = fresh(repository, str(tmp_path / "place"))
    finally:
        pid = int((tmp_path / "place" / "left").read_text())
        os.kill(pid, signal.SIGKILL)
        left.unlink(missing_ok=True)
    assert done.returncode == 1
    assert f"{IN_DEV_SHM}: {left.name}\nleft processes: {pid} sleep 1000 \n" in done.stdout


def test_a_directory_that_is_not_empty(repository: Path, tmp_path: Path) -> None:
    done = fresh(repository, str(repository))
    assert (done.returncode, done.stderr) == (2, f"{repository} is not empty: a fresh machine has nothing there\n")
