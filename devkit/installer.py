"""Small steps on virtual environments: create one, run pip for one, put one on top of another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The engine's wheels are built for this Python; anything else cannot load their compiled parts.
PYTHON = (3, 11)


class InstallError(RuntimeError):
    """A command that builds part of an environment failed; the message ends with its output."""


def run(command: Sequence[str | Path]) -> str:
    """Run a build step quietly; on failure say what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def host_python() -> str:
    """A Python of the right version to create environments with: this one, or the one on PATH."""
    if sys.version_info[:2] == PYTHON:
        return sys.executable
    name = "python{}.{}".format(*PYTHON)
    found = shutil.which(name)
    if found is None:
        raise InstallError(f"the devkit needs {name} on PATH")
    return found


def create_venv(root: Path, *, with_pip: bool) -> None:
    run([host_python(), "-m", "venv", *([] if with_pip else ["--without-pip"]), root])


def site_packages(root: Path) -> Path:
    return root / "lib" / "python{}.{}".format(*PYTHON) / "site-packages"


def venv_python(root: Path) -> Path:
    return root / "bin" / "python"


def pip(base: Path, *arguments: str | Path) -> str:
    """Run the base environment's pip."""
    return run([venv_python(base), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])


def put_on_top_of(root: Path, *below: Path) -> None:
    """Let the environment at `root` see those below it, after its own packages.

    Named to sort first: like in a plain installation, everything is importable by the time another
    .pth file's import line (the plugin's) runs.
    """
    lines = "".join(f"{site_packages(layer)}\n" for layer in below)
    (site_packages(root) / "00_mmlane_devkit_layers.pth").write_text(lines)
