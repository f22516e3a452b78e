"""What an installation carries, wheel and editable, in a clean virtual environment; and that it leaves nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mmlane import __version__
from mmlane.compat import matrix

PROBE = """
import importlib.metadata as m, json, pathlib, site, sys
import mmlane, mmlane_patches
from mmlane import compat
points = {g: [p.value for p in m.entry_points(group=g)] for g in ("sglang.srt.plugins", "console_scripts")}
roots = [pathlib.Path(p.__file__).parent for p in (mmlane, mmlane_patches)]
site_dir = pathlib.Path(next(p for p in site.getsitepackages() if "site-packages" in p))
print(json.dumps({
    "watching": "mmlane.bootstrap" in sys.modules and sys.modules["mmlane.import_hook"].WATCH in sys.meta_path,
    "pth": (site_dir / "mmlane.pth").read_text(),
    "start": (site_dir / "mmlane.start").read_text(),
    "points": points,
    "patches": [s.id for s in compat.contributed(mmlane_patches)[0]],
    "engines": len(compat.matrix().engines),
    "code": [str(f.relative_to(root)) for root in roots for f in sorted(root.rglob("*.py"))],
    "typed": [(root / "py.typed").is_file() for root in roots],
    "requires": m.requires("sglang-mmlane"),
}))
"""


def fresh_venv(path: Path) -> Path:
    venv.create(path, with_pip=False)
    return path / "bin" / "python"


@pytest.fixture(scope="session")
def with_dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with what mmlane needs and without mmlane, to be copied."""
    path = tmp_path_factory.mktemp("dependencies") / "venv"
    pip(fresh_venv(path), "install", "packaging", "pluggy", "PyYAML", "rich", "typer")
    return path


def pip(python: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "--quiet", *words], check=True)


def files(python: Path) -> set[str]:
    root = python.parent.parent
    return {str(p.relative_to(root)) for p in root.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_installation_carries_everything_and_leaves_nothing(
    kind: str, tmp_path: Path, checkout: Path, plugin_wheel: Path, with_dependencies: Path
) -> None:
    shutil.copytree(with_dependencies, tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    before = files(python)
    pip(python, "install", "--no-deps", *([str(plugin_wheel)] if kind == "wheel" else ["-e", str(checkout)]))
    result = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(result.stdout)
    assert found["watching"]
    assert found["pth"] == (checkout / "plugin" / "mmlane.pth").read_text()
    assert found["start"].strip() == "mmlane.bootstrap:install"
    assert found["points"]["sglang.srt.plugins"] == ["mmlane.entry:register"]
    assert "mmlane.cli:main" in found["points"]["console_scripts"]
    assert found["patches"] == list(matrix().rows)
    assert found["engines"] >= 19
    names = {r.split(">")[0].split(";")[0].strip().lower() for r in found["requires"]}
    assert names == {"packaging", "pluggy", "pyyaml", "rich", "typer"}  # neither sglang nor torch
    assert found["typed"] == [True, True]
    roots = [checkout / "plugin" / "mmlane", checkout / "patches" / "mmlane_patches"]
    assert found["code"] == [str(f.relative_to(root)) for root in roots for f in sorted(root.rglob("*.py"))]
    for command in ([python.parent / "mmlane"], [python, "-m", "mmlane"]):
        version = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (version.returncode, version.stdout) == (0, f"mmlane {__version__}\n"), version.stderr

    pip(python, "uninstall", "--yes", "sglang-mmlane")
    assert files(python) == before
    assert list((tmp_path / "venv").rglob("*mmlane*")) == []
    clean = subprocess.run([str(python), "-c", ""], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (clean.returncode, clean.stderr) == (0, "")


def test_a_checkout_that_has_moved(tmp_path: Path, checkout: Path) -> None:
    """What an editable installation leaves then: the startup hook, and a package without a file of ours in it."""
    python = fresh_venv(tmp_path / "venv")
    pip(python, "install", "--no-deps", "-e", str(checkout))
    (pointer,) = (tmp_path / "venv").rglob("_editable_impl_*.pth")
    pointer.unlink()
    (pointer.parent / "sglang.py").write_text("")  # a stand-in for the engine

    def runs(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(python), "-c", code], env=environ, capture_output=True, text=True, check=False)

    for code, environ in (("", {"MMLANE_STRICT": "1"}), ("import sglang", {"MMLANE": "off"})):
        silent = runs(code, **environ)
        assert (silent.returncode, silent.stderr) == (0, "")
    without = runs("import sglang")
    assert without.returncode == 0
    assert without.stderr.startswith("mmlane: is off, the engine runs without it: ModuleNotFoundError: ")
    strict = runs("import sglang", MMLANE_STRICT="1")
    assert strict.returncode == 1
    assert strict.stderr.startswith("mmlane: could not start: ModuleNotFoundError: ")
