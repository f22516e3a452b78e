"""What an installation carries, wheel and editable, in a clean virtual environment; and that it leaves nothing.

And what is released: the sdist builds the same wheel, and the metadata is true.
"""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from devkit import installer
from mmlane import __version__
from mmlane.compat import matrix
from tools import dist, pythons

NOT_ON_EVERY_PYTHON = "not among what the tests need on every Python"

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


def test_the_sdist_builds_the_same_wheel(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for tool in ("build", "hatchling", "twine"):
        pytest.importorskip(tool, reason=NOT_ON_EVERY_PYTHON)
    assert dist.main([str(tmp_path)]) == 0
    names = [f"sglang_mmlane-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capfd.readouterr().out.endswith(f"{names[0]}: the sdist builds the same wheel\n")
    with pytest.raises(SystemExit, match="is not empty: what is in it would be released as well"):
        dist.main([str(tmp_path)])


def test_wheels_that_differ(tmp_path: Path) -> None:
    contents = {
        "one": {"same": "1", "changed": "1", "gone": ""},
        "other": {"same": "1", "changed": "2", "new": ""},
    }
    for name, files in contents.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file, text in files.items():
                archive.writestr(zipfile.ZipInfo(file), text)
    one, other = tmp_path / "one", tmp_path / "other"
    assert dist.differences(one, other) == [f"only in {one}: gone", f"only in {other}: new", "differs: changed"]
    assert dist.differences(one, one) == []


def test_an_sdist_that_lacks_a_file_is_not_released(
    tmp_path: Path, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for tool in ("build", "hatchling", "twine"):
        pytest.importorskip(tool, reason=NOT_ON_EVERY_PYTHON)
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("plugin", "patches"):
        shutil.copytree(checkout / name, tree / name, ignore=ignored)
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "compat_matrix.yaml"):
        shutil.copy(checkout / name, tree)
    (tree / ".gitignore").write_text("")
    heading = "[tool.hatch.build.targets.sdist]\n"
    before, _, after = (checkout / "pyproject.toml").read_text().partition(heading)
    (tree / "pyproject.toml").write_text(f'{before}{heading}exclude = ["/plugin/mmlane/py.typed"]\n{after}')
    assert dist.main([str(tmp_path / "out")], tree) == 1
    assert ": mmlane/py.typed\ndiffers: sglang_mmlane-" in capfd.readouterr().out  # and the list of files


def test_the_metadata_is_true(plugin_wheel: Path) -> None:
    with zipfile.ZipFile(plugin_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == __version__
    classifiers = metadata.get_all("Classifier") or []
    known = pytest.importorskip("trove_classifiers", reason=NOT_ON_EVERY_PYTHON)
    assert set(classifiers) <= known.classifiers - known.deprecated_classifiers.keys()
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE)
    assert named[0] == str(metadata["Requires-Python"]).removeprefix(">=")
    assert {*named} == {*pythons.VERSIONS, "{}.{}".format(*installer.PYTHON)}  # those that tests run on


def test_the_version_is_written_once(checkout: Path) -> None:
    """Documents quote it where they show a line of the log; nothing else decides it."""
    files = [checkout / "Makefile", *checkout.glob("*.toml"), *checkout.glob("*.yaml")]
    for top in ("plugin", "patches", "tools", "devkit", ".github"):
        files += [path for path in (checkout / top).rglob("*") if path.suffix in (".py", ".yml", ".pth", ".start")]
    assert len(files) > 100
    pattern = re.compile(rf"(?<![\w.]){re.escape(__version__)}(?![\w.]*\d)")
    found = [str(path.relative_to(checkout)) for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == ["plugin/mmlane/__init__.py"]
