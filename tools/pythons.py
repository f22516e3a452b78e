"""`python -m tools.pythons [VERSION ...]`: the unit tests on the other Pythons that mmlane supports.

A Python that this machine does not have is skipped, with a line that says so; with `--required` that is a failure.
One whose environment cannot be made does not stop the others; the exit status is 1 then, as where tests fail. Each
has an environment in the cache with what the tests need, made once; mmlane itself is installed from this checkout
every time.

Where pip finds no torch for CPUs only, torch takes gigabytes for each Python. Without torch, the tests that need
it are skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from rich.console import Console

from devkit.cache import build_once, cache_root, digest, locked
from devkit.installer import InstallError, pip, run, venv_python

CHECKOUT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.12", "3.13")
TESTS = ("tests/unit", "-q", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")


def interpreter(version: str) -> Path | None:
    """A Python of that version on this machine: on PATH, or installed by pyenv or uv."""
    return next((python for python in _candidates(version) if _version(python) == version), None)


def _candidates(version: str) -> Iterator[Path]:
    on_path = shutil.which(f"python{version}")
    if on_path is not None:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    yield from sorted(uv.glob(f"cpython-{version}.*/bin/python"))


def _version(python: Path) -> str:
    """Major and minor version of a Python; "" where it does not run, like a shim of pyenv that is not chosen."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(name: str, python: Path, *, with_torch: bool) -> Path:
    """A virtual environment of that Python with what the tests and mmlane need, without mmlane."""
    lines = (CHECKOUT / "requirements-test.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#" if with_torch else ("#", "torch=="))]
    needs = [*pinned, *(requires("sglang-mmlane") or [])]

    def build(root: Path) -> None:
        run([python, "-m", "venv", root])
        pip(root, "install", *needs)

    return build_once(cache_root() / "pythons" / name, digest(str(python), *needs), build)


def unit_tests(version: str, python: Path, *, with_torch: bool) -> bool:
    """Whether the unit tests pass on a Python."""
    name = version if with_torch else f"{version}-without-torch"
    root = environment(name, python, with_torch=with_torch)
    with locked(cache_root() / "pythons" / f"{name}-in-use"):
        pip(root, "install", "--no-deps", "--editable", CHECKOUT)
        done = subprocess.run([venv_python(root), "-m", "pytest", *TESTS], cwd=CHECKOUT, check=False)
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pythons", description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--required", action="store_true", help="fail where one of them is not installed")
    parser.add_argument("--without-torch", action="store_true", help="skip the tests that need it")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)
    results: dict[str, str] = {}
    for version in chosen.versions:
        python = interpreter(version)
        if python is None:
            missing = f"no Python {version} on PATH, nor one installed by pyenv or uv"
            results[version] = f"NOT RUN: {missing}" if chosen.required else f"skipped: {missing}"
            continue
        console.rule(f"Python {version}: {python}")
        began = time.monotonic()
        try:
            passed = unit_tests(version, python, with_torch=not chosen.without_torch)
        except InstallError as error:
            console.print(str(error), markup=False)
            results[version] = "NOT RUN: its environment could not be made, see above"
            continue
        results[version] = f"{'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s"
    console.rule("unit tests")
    for version, result in results.items():
        console.print(f"{version:6}{result}", markup=False)
    return 1 if any(result.startswith(("FAILED", "NOT RUN")) for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
