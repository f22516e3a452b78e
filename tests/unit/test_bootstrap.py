"""The import watch that the .pth line sets: what it costs, and that it never gets in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "plugin"


def run(code: str, path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with `path` first on its import path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MMLANE")}
    env.update(environ, PYTHONPATH=str(path))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def package(path: Path, name: str, body: str = "") -> None:
    (path / name).mkdir(parents=True, exist_ok=True)
    (path / name / "__init__.py").write_text(body)


def test_it_loads_nothing_but_itself(tmp_path: Path) -> None:
    """In an interpreter without the .pth line: what does `install` bring in?"""
    source = Path(__file__).resolve().parents[2] / "plugin"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules);"
        "import mmlane.bootstrap; mmlane.bootstrap.install();"
        "print(sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(source)], capture_output=True, text=True, check=True
    )
    added = set(eval(result.stdout))
    assert added == {"mmlane", "mmlane.bootstrap", "mmlane.import_hook"}


def test_an_after_callback_sees_the_finished_module_before_its_importer_goes_on(tmp_path: Path) -> None:
    package(tmp_path, "watched", "x = 1\n")
    result = run(
        "from mmlane.import_hook import ImportWatch; import sys\n"
        "w = ImportWatch(); sys.meta_path.insert(0, w)\n"
        "w.after['watched'] = lambda m: setattr(m, 'x', m.x + 1)\n"
        "from watched import x; import watched\n"
        "assert x == 2 and w.after == {}\n"
        "assert type(watched.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert 'exec_module' not in vars(watched.__loader__)\n",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_a_watched_module_that_is_missing_or_fails_does_so_as_ever(tmp_path: Path) -> None:
    package(tmp_path, "broken", "raise RuntimeError('mine')\n")
    result = run(
        "from mmlane.import_hook import ImportWatch; import sys\n"
        "w = ImportWatch(); sys.meta_path.insert(0, w)\n"
        "w.after['broken'] = w.after['missing'] = lambda m: print('called')\n"
        "try: import missing\n"
        "except ModuleNotFoundError as e: assert e.name == 'missing'\n"
        "try: import broken\n"
        "except RuntimeError as e: assert str(e) == 'mine'\n",
        tmp_path,
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_installing_twice_watches_once(tmp_path: Path) -> None:
    """A virtual environment may run a .pth line twice."""
    result = run(
        "import sys, mmlane.bootstrap as b, mmlane.import_hook as h; b.install(); b.install()\n"
        "print(sys.meta_path.count(h.WATCH))",
        tmp_path,
    )
    assert result.stdout.strip() == "1", result.stderr


def test_off_does_nothing_at_all(tmp_path: Path) -> None:
    package(tmp_path, "sglang")
    result = run(
        "import sys, mmlane.bootstrap, mmlane.import_hook as h\n"
        "import sglang\n"
        "print(h.WATCH in sys.meta_path, 'mmlane.entry' in sys.modules)",
        tmp_path,
        MMLANE="off",
    )
    assert result.stdout.strip() == "False False", result.stderr


def test_a_flag_is_taken_off_even_when_the_variable_says_off(tmp_path: Path) -> None:
    package(tmp_path, "sglang")
    result = run(
        "import sys; sys.argv += ['--mmlane', 'backport', '--tp', '2']\n"
        "import mmlane.bootstrap; mmlane.bootstrap.install()\n"
        "import sglang, os\n"
        "print(sys.argv[1:], os.environ['MMLANE'])",
        tmp_path,
        MMLANE="off",
    )
    assert result.stdout.strip() == "['--tp', '2'] backport", result.stderr


def test_looking_for_the_engine_starts_nothing(tmp_path: Path) -> None:
    package(tmp_path, "sglang")
    result = run(
        "import importlib.util, sys, mmlane.bootstrap as b; b.install()\n"
        "assert importlib.util.find_spec('sglang') is not None\n"
        "assert 'mmlane.entry' not in sys.modules\n"
        "import sglang\n"
        "assert 'mmlane.entry' in sys.modules",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr


# --- the startup hook, where the package behind it is gone or damaged ---

DAMAGE = {
    "gone": {},
    "half written": {"__init__": "", "bootstrap": "def install("},
    "of another version": {"__init__": "", "bootstrap": ""},
    "raising": {"__init__": "raise OSError('made to fail')"},
    "without the watch": {"__init__": "", "bootstrap": (PLUGIN / "mmlane" / "bootstrap.py").read_text()},
}


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A site directory with the startup hook, what is left of the package, and a stand-in for the engine."""
    shutil.copy(PLUGIN / "mmlane.pth", tmp_path)
    for name, body in DAMAGE[request.param].items():
        file = tmp_path / "mmlane" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
    package(tmp_path, "sglang", "print('the engine')\n")
    return tmp_path


def run_in(site: Path, code: str, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose only packages are those of a site directory."""
    start = f"import site; site.addsitedir({str(site)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code, *argv],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("MMLANE")}, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_without_the_engine_runs_silently_with_a_damaged_installation(damaged: Path) -> None:
    result = run_in(damaged, "import colorsys; print('fine')", "--mmlane-strict", MMLANE_STRICT="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


LOOK = "import importlib.util as u; assert u.find_spec('sglang').submodule_search_locations; print('looked')\n"


@pytest.mark.parametrize("how", ["variable", "flag"])
def test_strict_ends_the_engine_when_it_is_imported_and_not_before(damaged: Path, how: str) -> None:
    argv, environ = (["--mmlane-strict"], {}) if how == "flag" else ([], {"MMLANE_STRICT": "1"})
    result = run_in(damaged, f"{LOOK}import sglang", *argv, **environ)
    assert (result.returncode, result.stdout) == (1, "looked\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("mmlane: could not start: ") and "reinstall mmlane with pip" in line


def test_without_strict_a_damaged_installation_turns_mmlane_off_and_says_so(damaged: Path) -> None:
    code = (
        f"{LOOK}import sglang, os, sys\n"
        "assert vars(sglang.__loader__).keys() == {'name', 'path'}\n"
        "print(os.environ['MMLANE'])"
    )
    result = run_in(damaged, code)
    assert (result.returncode, result.stdout) == (0, "looked\nthe engine\noff\n"), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("mmlane: is off, the engine runs without it: ")
    silent = run_in(damaged, code, MMLANE="off")
    assert (silent.returncode, silent.stderr) == (0, "")


@pytest.mark.parametrize("parent", ["managed", "did not"])
def test_a_child_of_a_patched_engine_ends_where_the_package_is_gone(damaged: Path, parent: str) -> None:
    """An engine's process that is started after the package has gone: half of an engine is not patched."""
    (damaged / "worker.py").write_text(
        f"import site; site.addsitedir({str(damaged)!r})\nimport sglang\ndef work(): print('served')\n"
    )
    code = "import multiprocessing as m, os, worker\n"
    if parent == "managed":
        code += "del os.environ['MMLANE']\n"
    code += "p = m.get_context('spawn').Process(target=worker.work); p.start(); p.join(); print(p.exitcode)\n"
    result = run_in(damaged, code)
    assert result.stderr.count("\n") == (2 if parent == "managed" else 1), result.stderr
    assert result.stdout.endswith("\n1\n" if parent == "managed" else "served\n0\n"), result.stderr
    assert ("mmlane: could not start: " in result.stderr) == (parent == "managed")


def test_a_part_of_the_package_is_gone(tmp_path: Path) -> None:
    """The watch is there, and what it starts is not: the same follows."""
    shutil.copy(PLUGIN / "mmlane.pth", tmp_path)
    (tmp_path / "mmlane").mkdir()
    for name in ("__init__.py", "bootstrap.py", "import_hook.py"):
        shutil.copy(PLUGIN / "mmlane" / name, tmp_path / "mmlane")
    package(tmp_path, "sglang", "print('the engine')\n")
    result = run_in(tmp_path, f"{LOOK}import sglang, os; print(os.environ['MMLANE'])")
    assert (result.returncode, result.stdout) == (0, "looked\nthe engine\noff\n")
    assert result.stderr.startswith("mmlane: is off, the engine runs without it: ImportError: ")
    strict = run_in(tmp_path, f"{LOOK}import sglang", MMLANE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "looked\n")
    assert strict.stderr.startswith("mmlane: could not start: ") and strict.stderr.count("\n") == 1
