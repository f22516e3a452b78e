"""The import watch that the .pth line sets: what it costs, and that it never gets in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
    assert added == {"mmlane", "mmlane.bootstrap"}


def test_an_after_callback_sees_the_finished_module_before_its_importer_goes_on(tmp_path: Path) -> None:
    package(tmp_path, "watched", "x = 1\n")
    result = run(
        "from mmlane.bootstrap import ImportWatch; import sys\n"
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
        "from mmlane.bootstrap import ImportWatch; import sys\n"
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
        "import sys, mmlane.bootstrap as b; b.install(); b.install()\nprint(sys.meta_path.count(b.WATCH))",
        tmp_path,
    )
    assert result.stdout.strip() == "1", result.stderr


def test_off_does_nothing_at_all(tmp_path: Path) -> None:
    package(tmp_path, "sglang")
    result = run(
        "import sys, mmlane.bootstrap as b\n"
        "import sglang\n"
        "print(b.WATCH in sys.meta_path, 'mmlane.entry' in sys.modules)",
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
