"""`mmlane serve`: the startup hook in every process of the engine, where no .pth file brings it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipapp
import zipfile
from pathlib import Path
from typing import Any

import packaging
import pluggy
import pytest
import yaml

# The engine's launcher: processes by each way in which multiprocessing starts them, and processes of those.
LAUNCHER = """
import multiprocessing, sys
from sglang.worker import work
if __name__ == "__main__":
    work("main")
    for method in ("spawn", "forkserver", "fork"):
        child = multiprocessing.get_context(method).Process(target=work, args=(method, method))
        child.start()
        child.join()
    sys.exit(7)
"""
WORKER = """
import json, multiprocessing, os, sys
def work(name, method=""):
    entry = sys.modules.get("mmlane.entry")
    session = entry and entry.session
    print(json.dumps({"name": name, "by": session and session.trigger,
        "mode": session and session.settings.mode, "argv": sys.argv}), flush=True)
    if method:
        child = multiprocessing.get_context(method).Process(target=work, args=(f"{name} {name}",))
        child.start()
        child.join()
"""
EVERYWHERE = ["main", *(name for m in ("spawn", "forkserver", "fork") for name in (m, f"{m} {m}"))]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A directory with a stand-in for the engine."""
    package = tmp_path / "engine" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(LAUNCHER)
    (package / "worker.py").write_text(WORKER)
    metadata = package.parent / "sglang-0.5.12.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.12\n")
    return package.parent


def everything() -> str:
    """The packages of this Python, those of an editable installation too, for one that reads no .pth file."""
    return os.pathsep.join(entry for entry in sys.path if entry)


def run(
    *words: str | Path, path: str | Path = "", cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MMLANE", "PYTHON"))}
    env.update(environ)
    if path:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, words)], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )


def processes(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 7, done.stderr
    assert [process["name"] for process in found] == EVERYWHERE, done.stderr
    return found


SCRIPT = "import sys; from mmlane.cli import main; main()\n"  # pip's


@pytest.mark.parametrize("command", ["module", "script", "launcher"])
def test_without_site_every_process_has_the_hook(engine: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "mmlane").write_text(SCRIPT)
    words = {
        "module": ["-m", "mmlane", "serve"],
        "script": [str(tmp_path / "mmlane"), "serve"],
        "launcher": ["-m", "mmlane.launcher"],
    }[command]
    arguments = ["--model-path", "x", "--help", "-h", "--", "status"]
    found = processes(run("-S", *words, *arguments, path=f"{engine}{os.pathsep}{everything()}"))
    assert {process["by"] for process in found} == {"startup hook"}
    assert found[0]["argv"] == ["mmlane serve", *arguments]


def test_the_hook_is_not_there_without_the_command(engine: Path) -> None:
    """So that the tests above can fail."""
    done = run("-S", "-m", "sglang.launch_server", path=f"{engine}{os.pathsep}{everything()}")
    assert {process["by"] for process in processes(done)} == {None}


def test_a_zip_application(engine: Path, tmp_path: Path, plugin_wheel: Path) -> None:
    """It holds the unpacked wheel. Its Python has nothing else but the standard library."""
    app = tmp_path / "app"
    with zipfile.ZipFile(plugin_wheel) as wheel:
        wheel.extractall(app)
    for package in (packaging, pluggy, yaml):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(engine, app, dirs_exist_ok=True)
    # Not by mmlane.cli, which needs typer and all that typer needs: tests/install has that.
    (app / "__main__.py").write_text(
        "import runpy; runpy.run_module('mmlane.launcher', run_name='__main__', alter_sys=True)"
    )
    zipapp.create_archive(app, tmp_path / "app.pyz")
    found = processes(run("-I", "-S", tmp_path / "app.pyz"))
    assert {process["by"] for process in found} == {"startup hook"}


def test_mmlanes_flags_are_taken_off_and_reach_the_children(engine: Path) -> None:
    path = f"{engine}{os.pathsep}{everything()}"
    done = run("-S", "-m", "mmlane", "serve", "--mmlane", "backport", "--tp", "2", path=path)
    for process in processes(done):
        assert (process["mode"], process["argv"]) == ("backport", ["mmlane serve", "--tp", "2"])


def test_off_is_off(engine: Path) -> None:
    done = run("-S", "-m", "mmlane", "serve", path=f"{engine}{os.pathsep}{everything()}", MMLANE="off")
    assert {process["by"] for process in processes(done)} == {None}
    assert done.stderr == ""


@pytest.mark.parametrize("there", ["nothing", "a directory of that name"])
def test_no_engine_is_one_line_and_exit_code_3(tmp_path: Path, there: str) -> None:
    if there != "nothing":
        (tmp_path / "sglang").mkdir()
    done = run("-S", "-m", "mmlane", "serve", "--help", path=everything(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mmlane: no engine: this Python (") and "cannot import sglang" in line


def test_with_the_startup_hook_it_is_started_once(engine: Path) -> None:
    """An ordinary installation, where the .pth file has brought the hook already."""
    found = processes(run("-m", "mmlane", "serve", path=engine))
    assert {process["by"] for process in found} == {"startup hook"}
