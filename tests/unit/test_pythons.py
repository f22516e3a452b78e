"""`make pythons`: which Python it takes for a version."""

from __future__ import annotations

from pathlib import Path

import pytest

from devkit.installer import InstallError
from tools import pythons


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a shim of that name does not run, and pyenv and uv have installed nothing."""
    program(tmp_path / "shims" / "python9.9", "echo 'pyenv: python9.9: command not found' >&2; exit 127")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))


@pytest.mark.usefixtures("nowhere")
def test_what_does_not_run_or_is_another_version_is_not_taken(tmp_path: Path) -> None:
    assert pythons.interpreter("9.9") is None
    program(tmp_path / "pyenv" / "versions" / "9.9.1" / "bin" / "python", "echo 9.8")
    assert pythons.interpreter("9.9") is None


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    "place", ["pyenv/versions/9.9.1/bin/python", "uv/cpython-9.9.2-linux-x86_64-gnu/bin/python"]
)
def test_what_pyenv_or_uv_has_installed_is_found(tmp_path: Path, place: str) -> None:
    python = program(tmp_path / place, "echo 9.9")
    assert pythons.interpreter("9.9") == python


@pytest.mark.usefixtures("nowhere")
def test_an_environment_that_cannot_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("9.8", "9.9"):
        program(tmp_path / "pyenv" / "versions" / f"{version}.1" / "bin" / "python", f"echo {version}")

    def unit_tests(version: str, python: Path, *, with_torch: bool) -> bool:
        if version == "9.8":
            raise InstallError("no such wheel")
        return True

    monkeypatch.setattr(pythons, "unit_tests", unit_tests)
    assert pythons.main(["9.8", "9.9", "9.7"]) == 1
    printed = capsys.readouterr().out
    assert "no such wheel" in printed
    assert "9.8   NOT RUN: its environment could not be made, see above\n9.9   passed in " in printed
    assert "9.7   skipped: no Python 9.7" in printed
    assert pythons.main(["9.9", "9.7"]) == 0
    assert pythons.main(["--required", "9.9", "9.7"]) == 1
    assert "9.7   NOT RUN: no Python 9.7" in capsys.readouterr().out
