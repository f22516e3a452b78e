"""The driver in processes of its own: triggers in any order, settings refused, strict, other packages' patches.

The engine here is a stand-in of a few lines with the names that the driver looks for; the real engine is started
in tests/engine.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmlane.compat import matrix

MODULES = {
    "__init__": "",
    "version": "",
    "srt/server_args": "class ServerArgs:\n    @staticmethod\n    def add_cli_args(parser): pass\n",
    "srt/entrypoints/engine": "from sglang.srt.managers.target import function\n",
    "srt/managers/target": "def function(x): return x\n",
}
CONTRIBUTION = """
from packaging.version import Version
from mmlane.hookspecs import hookimpl
from mmlane.patching import Cell, PatchSpec, Target

def double(original):
    def doubled(x): return 2 * original(x)
    doubled.__wrapped__ = original
    return doubled

@hookimpl
def mmlane_patches():
    return [PatchSpec(
        id="theirs", why="", consequence="x is not doubled", upstream=(), drop_when="", group="theirs",
        cells=(Cell(Version("0.5.9"), "apply", "because"),),
        targets=(Target("sglang.srt.managers.target", "function", "{signature}", double),),
    )]
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A directory to import from: a stand-in engine 0.5.12, and a package that contributes one patch to mmlane."""
    for name, body in MODULES.items():
        file = tmp_path / "sglang" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    metadata(tmp_path, "sglang", "0.5.12")
    contribute(tmp_path, "(x)")
    return tmp_path


def metadata(path: Path, name: str, version: str, entry_points: str = "") -> None:
    directory = path / f"{name}-{version}.dist-info"
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (directory / "entry_points.txt").write_text(entry_points)


def contribute(path: Path, signature: str) -> None:
    (path / "theirs.py").write_text(CONTRIBUTION.format(signature=signature))
    metadata(path, "theirs", "1.0", "[mmlane]\ntheirs = theirs\n")


# The interpreter that runs the tests has mmlane's own .pth line; each test pulls the triggers that it is about.
FORGET_PTH = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ImportWatch"]
for name in [name for name in sys.modules if name.partition(".")[0] == "mmlane"]:
    del sys.modules[name]
"""


def run(path: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MMLANE")}
    # Our own patches do not fit the stand-in; they are turned off so that only what a test is about is printed.
    env["MMLANE_DISABLE"] = ",".join(matrix().rows)  # the stand-in has none of what they change
    env.update(environ, PYTHONPATH=str(path))
    return subprocess.run(
        [sys.executable, "-c", FORGET_PTH + code], env=env, capture_output=True, text=True, check=False
    )


STEPS = {
    "pth": "import mmlane.bootstrap; mmlane.bootstrap.install()",
    "entry": "import mmlane.entry; mmlane.entry.register()",
    "target": "import sglang.srt.managers.target",
    "engine": "import sglang.srt.entrypoints.engine",
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
def test_triggers_and_imports_in_any_order(stand_in: Path, order: tuple[str, ...]) -> None:
    code = "\n".join(STEPS[step] for step in order)
    code += (
        "\nfrom sglang.srt.managers import target\nfrom sglang.srt.entrypoints import engine\n"
        "assert target.function is engine.function and target.function(2) == 4\n"
        "import mmlane.entry\nmmlane.entry.stop()\n"
        "assert target.function is engine.function and target.function(2) == 2\n"
    )
    result = run(stand_in, code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("applied: theirs") == 1
    assert len(result.stderr.splitlines()) <= 6


def test_off_by_variable_with_the_entry_point(stand_in: Path) -> None:
    code = f"{STEPS['entry']}\n{STEPS['engine']}\nassert sglang.srt.entrypoints.engine.function(2) == 2"
    result = run(stand_in, code, MMLANE="off")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MMLANE": "on"}, "MMLANE=on is not one of: lane, backport, off"),
        ({"MMLANE_DISABLE": "nonsense"}, "MMLANE_DISABLE=nonsense: no such patch; there are: shm_pointer"),
    ],
)
def test_a_wrong_setting_ends_the_engine_with_the_right_ones(
    stand_in: Path, environ: dict[str, str], message: str
) -> None:
    result = run(stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')", **environ)
    assert result.returncode == 1 and "served" not in result.stdout
    assert message in result.stderr and "Traceback" not in result.stderr


# --- flags, and the engine's config file ---


def typing(*words: str) -> str:
    return f"import sys; sys.argv[1:] = {list(words)!r}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mmlane", "on"), "mmlane: --mmlane on is not one of: lane, backport, off"),
        (("--mmlane-disable=x,theirs,y",), "mmlane: --mmlane-disable=x,y: no such patch; there are: shm_pointer,"),
        (("--mmlane-disable", "x", "--mmlane-disable", "y"), "mmlane: --mmlane-disable x,y: no such patch; there"),
    ],
)
def test_a_wrong_flag_ends_the_engine_and_is_named_as_it_was_typed(
    stand_in: Path, words: tuple[str, ...], message: str
) -> None:
    result = run(stand_in, f"{typing(*words)}{STEPS['pth']}\n{STEPS['engine']}\nprint('served')")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


PARSER = """
import yaml
class ConfigArgumentMerger:
    def merge(self, file_path): return self._parse_yaml_config(file_path)
    def _parse_yaml_config(self, file_path): return yaml.safe_load(open(file_path))
"""
PARSERS = ("server_args_config_parser", "utils.server_args_config_parser")


@pytest.fixture(params=PARSERS)
def merging(request: pytest.FixtureRequest, stand_in: Path) -> str:
    """The engine reads its config file, `launch.yaml`, and prints what it finds there."""
    file = stand_in / "sglang/srt" / f"{request.param.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(PARSER)
    return (
        f"\nfrom sglang.srt.{request.param} import ConfigArgumentMerger\n"
        f"print(ConfigArgumentMerger().merge({str(stand_in / 'launch.yaml')!r}))\n"
    )


def launching(stand_in: Path, text: str) -> str:
    file = stand_in / "launch.yaml"
    file.write_text(text)
    return typing("--config", str(file))


@pytest.mark.parametrize("trigger", ["pth", "entry"])
def test_the_config_file_says_what_flags_say_and_the_engine_sees_none_of_it(
    stand_in: Path, merging: str, trigger: str
) -> None:
    disable = ", ".join([*matrix().rows, "theirs"])
    started = launching(stand_in, f"tp: 2\nmmlane: backport\nmmlane_disable: [{disable}]\nmmlane-strict: false\n")
    result = run(stand_in, f"{started}{STEPS[trigger]}\n{STEPS['engine']}{merging}", MMLANE_STRICT="1")
    assert (result.returncode, result.stdout) == (0, "{'tp': 2}\n"), result.stderr
    assert ", mode backport" in result.stderr and "theirs" in result.stderr.partition("turned off: ")[2]


@pytest.mark.parametrize("trigger", ["pth", "entry"])
def test_the_engine_does_not_see_that_its_config_file_turns_mmlane_off(
    stand_in: Path, merging: str, trigger: str
) -> None:
    started = launching(stand_in, "tp: 2\nmmlane: off\n")
    result = run(stand_in, f"{started}{STEPS[trigger]}\n{STEPS['engine']}{merging}")
    assert (result.returncode, result.stdout, result.stderr) == (0, "{'tp': 2}\n", "")


def test_the_engine_does_not_see_our_config_keys_where_mmlane_gives_up(stand_in: Path, merging: str) -> None:
    started = launching(stand_in, "tp: 2\nmmlane: lane\n")
    result = run(stand_in, f"{started}{FAIL}{STEPS['pth']}\n{STEPS['engine']}{merging}")
    assert (result.returncode, result.stdout) == (0, "{'tp': 2}\n"), result.stderr
    assert "OSError: made to fail" in result.stderr


def test_a_parser_that_was_imported_before_is_covered_as_well(stand_in: Path, merging: str) -> None:
    started = launching(stand_in, "tp: 2\nmmlane: backport\n")
    result = run(stand_in, f"{started}{merging}{STEPS['entry']}{merging}")
    assert result.stdout == "{'tp': 2, 'mmlane': 'backport'}\n{'tp': 2}\n", result.stderr


def test_a_config_file_without_keys_of_ours_is_left_to_the_engine_alone(stand_in: Path, merging: str) -> None:
    check = "print(ConfigArgumentMerger._parse_yaml_config.__module__)"
    result = run(stand_in, f"{launching(stand_in, 'tp: 2')}{STEPS['pth']}\n{STEPS['engine']}{merging}{check}")
    assert result.stdout.startswith("{'tp': 2}\nsglang.srt."), result.stderr


def test_a_wrong_key_ends_the_engine_and_is_named_with_its_file(stand_in: Path) -> None:
    started = launching(stand_in, "mmlane-disable: x\n")
    result = run(stand_in, f"{started}{STEPS['pth']}\n{STEPS['engine']}\nprint('served')")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"mmlane: {stand_in}/launch.yaml: mmlane-disable: x: no such patch; there are:"
    )


def test_an_engine_that_reads_its_config_file_otherwise_is_told_of(stand_in: Path) -> None:
    file = stand_in / "sglang/srt/server_args_config_parser.py"
    file.write_text(PARSER.replace("_parse_yaml_config", "_load"))
    started = launching(stand_in, "mmlane: backport\n")
    code = f"{started}{STEPS['pth']}\nimport sglang.srt.server_args_config_parser\nprint('served')"
    result = run(stand_in, code)
    assert (result.returncode, result.stdout) == (0, "served\n"), result.stderr
    assert "found no _parse_yaml_config there; so the engine may refuse mmlane's keys" in result.stderr


def test_children_go_by_what_their_parent_read(stand_in: Path) -> None:
    """They have its command line, but the file may have changed since."""
    (stand_in / "worker.py").write_text(
        "import os\nimport sglang\n"
        "def run_scheduler_process(): print(os.environ['MMLANE'], os.environ['MMLANE_DISABLE'], flush=True)\n"
    )
    started = launching(stand_in, "mmlane: backport\nmmlane-disable: theirs\n")
    change = f"open({str(stand_in / 'launch.yaml')!r}, 'w').write('mmlane: nonsense')"
    result = run(stand_in, f"{started}{STEPS['pth']}\n{STEPS['engine']}\n{change}\n{CHILD}", MMLANE_LOG="warning")
    assert result.stdout == "backport theirs\n0\n", result.stderr


# --- a plan that cannot be carried out ---


def test_what_cannot_be_applied_is_skipped_with_one_line_that_says_all(stand_in: Path) -> None:
    contribute(stand_in, "(x, y)")
    result = run(
        stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\nassert sglang.srt.entrypoints.engine.function(2) == 2"
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "skipped theirs" in line]
    for part in (
        "wanted sglang.srt.managers.target.function(x, y), found (x)",
        "so x is not doubled",
        "MMLANE_DISABLE=theirs",
    ):
        assert part in line


def test_strict_ends_the_engine_before_it_serves(stand_in: Path) -> None:
    contribute(stand_in, "(x, y)")
    result = run(stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')", MMLANE_STRICT="1")
    assert result.returncode == 1 and "served" not in result.stdout
    assert "skipped theirs" in result.stderr and "MMLANE_STRICT=1" in result.stderr


def test_strict_ends_the_engine_when_another_plugin_holds_the_target(stand_in: Path) -> None:
    taking = "import sglang.srt.managers.target as t\ndef other(x): return x\nt.function = other\n"
    (stand_in / "taker.py").write_text(taking)
    code = f"import taker\n{STEPS['entry']}\n{STEPS['engine']}\nprint('served')"
    result = run(stand_in, code, MMLANE_STRICT="1")
    assert result.returncode == 1 and "served" not in result.stdout
    assert "already replaced by taker:other" in result.stderr


def test_a_plugin_that_replaces_a_patch_later_is_named(stand_in: Path) -> None:
    taking = "import sglang.srt.managers.target as t\ndef other(x): return x\nt.function = other\n"
    (stand_in / "taker.py").write_text(taking)
    code = f"{STEPS['pth']}\nimport taker\n{STEPS['engine']}\nprint('served')"
    result = run(stand_in, code)
    assert result.returncode == 0 and "served" in result.stdout
    assert "target.function, patched by theirs, has since been replaced by taker:other" in result.stderr
    strict = run(stand_in, code, MMLANE_STRICT="1")
    assert strict.returncode == 1 and "served" not in strict.stdout


@pytest.mark.parametrize("log", ["info", "warning"])
def test_an_unknown_variable_is_named_and_does_not_stop_the_engine(stand_in: Path, log: str) -> None:
    code = f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')"
    result = run(stand_in, code, MMLANE_CAPCITY_MB="64", MMLANE_STRICT="1", MMLANE_LOG=log)
    assert result.returncode == 0 and "served" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "CAPCITY" in line]
    assert "unknown variables, which do nothing: MMLANE_CAPCITY_MB (did you mean MMLANE_CAPACITY_MB?)" in line
    assert len(result.stderr.splitlines()) <= 6


FAIL = "import mmlane.compat\ndef plan(*arguments): raise OSError('made to fail')\nmmlane.compat.plan = plan\n"


def test_a_failure_of_its_own_leaves_the_engine_and_its_children_alone(stand_in: Path) -> None:
    code = f"{FAIL}{STEPS['pth']}\n{STEPS['engine']}\nimport os\nprint('served', os.environ['MMLANE'])"
    result = run(stand_in, code)
    assert (result.returncode, result.stdout) == (0, "served off\n"), result.stderr
    assert result.stderr.startswith("mmlane: is off, the engine runs without it: OSError: made to fail")
    strict = run(stand_in, code, MMLANE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")


def test_a_failure_in_a_child_alone_ends_it(stand_in: Path) -> None:
    """The other ranks would wait for it in a collective that it knows nothing of."""
    (stand_in / "failing.py").write_text(FAIL)
    (stand_in / "worker.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.current_process().name != 'MainProcess': import failing\n"
        f"{STEPS['engine']}\n"
        "def work(): print('served')\n"
    )
    code = (
        f"import multiprocessing as m\n{STEPS['pth']}\nimport worker\n"
        "process = m.get_context('spawn').Process(target=worker.work)\n"
        "process.start(); process.join(); print(process.exitcode)\n"
    )
    result = run(stand_in, code)
    assert result.stdout == "1\n", result.stderr
    assert "could not start in this process, whose peers may count on it: OSError: made to fail" in result.stderr


def test_a_missing_dependency_leaves_the_engine_alone(stand_in: Path) -> None:
    (stand_in / "pluggy.py").write_text("raise ModuleNotFoundError('no pluggy')")
    code = f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')"
    result = run(stand_in, code)
    assert (result.returncode, result.stdout) == (0, "served\n"), result.stderr
    assert "the engine runs without it: ModuleNotFoundError: no pluggy" in result.stderr
    strict = run(stand_in, code, MMLANE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")


def test_half_of_the_package_is_missing(stand_in: Path) -> None:
    (stand_in / "mmlane_patches.py").write_text("raise ModuleNotFoundError('no patches')")
    code = f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')"
    result = run(stand_in, code)
    assert (result.returncode, result.stdout) == (0, "served\n"), result.stderr
    assert "the engine runs without it: ModuleNotFoundError: no patches" in result.stderr
    strict = run(stand_in, code, MMLANE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")


# --- what goes wrong later ---


@pytest.fixture
def by_name(stand_in: Path) -> Path:
    """The contributed patch names its replacement, in a module of its own; and the engine imports torch first."""
    theirs = (stand_in / "theirs.py").read_text()
    (stand_in / "replacement.py").write_text(theirs[theirs.index("def double") : theirs.index("@hookimpl")])
    (stand_in / "theirs.py").write_text(theirs.replace(", double)", ", 'replacement:double')"))
    (stand_in / "torch.py").write_text("")
    (stand_in / "sglang/srt/server_args.py").write_text(f"import torch\n{MODULES['srt/server_args']}")
    return stand_in


GO = "import pathlib, sys; sys.dont_write_bytecode = True; gone = pathlib.Path('{}/replacement.py')\n"


def test_what_a_process_will_need_is_loaded_with_the_first_modules_of_the_engine(by_name: Path) -> None:
    code = (
        f"{GO.format(by_name)}{STEPS['pth']}\nimport sglang.srt.server_args\ngone.unlink()\n{STEPS['engine']}\n"
        "assert sglang.srt.entrypoints.engine.function(2) == 4\n"
    )
    result = run(by_name, code)
    assert result.returncode == 0, result.stderr
    assert "skipped" not in result.stderr


def test_nothing_is_loaded_before_the_engine_has_imported_torch(by_name: Path) -> None:
    (by_name / "sglang/srt/server_args.py").write_text(MODULES["srt/server_args"])
    code = f"{STEPS['pth']}\nimport sglang.srt.server_args, sys\nassert 'replacement' not in sys.modules"
    result = run(by_name, code)
    assert result.returncode == 0, result.stderr


CHILD = """
import multiprocessing as m, worker
process = m.get_context('spawn').Process(target=worker.run_scheduler_process)
process.start(); process.join(); print(process.exitcode)
"""


def test_what_is_gone_in_a_child_alone_ends_it(by_name: Path) -> None:
    (by_name / "worker.py").write_text(f"{STEPS['engine']}\ndef run_scheduler_process(): print('served')\n")
    result = run(by_name, f"{GO.format(by_name)}{STEPS['pth']}\n{STEPS['engine']}\ngone.unlink()\n{CHILD}")
    assert result.stdout == "1\n", result.stderr
    *_, line = result.stderr.splitlines()
    assert "could not start in this process, whose peers may count on it: " in line
    assert "nothing to replace sglang.srt.managers.target.function with: ModuleNotFoundError" in line


def test_what_a_process_leaves_out_its_children_leave_out(by_name: Path) -> None:
    """It is there again when the child starts, as after an upgrade; the child still leaves the patch out."""
    (by_name / "worker.py").write_text(
        f"{STEPS['engine']}\nimport sglang\n"
        "def run_scheduler_process(): assert sglang.srt.entrypoints.engine.function(2) == 2\n"
    )
    code = (
        f"{GO.format(by_name)}body = gone.read_text(); gone.unlink()\n{STEPS['pth']}\n{STEPS['engine']}\n"
        f"assert sglang.srt.entrypoints.engine.function(2) == 2\ngone.write_text(body)\n{CHILD}"
    )
    result = run(by_name, code)
    assert result.stdout == "0\n", result.stderr
    assert "skipped theirs: nothing to replace" in result.stderr


BREAK = "from mmlane.patching import Patcher\ndef broken(*a): raise OSError('made to fail')\n"


def test_an_unexpected_failure_does_not_reach_the_engines_import(stand_in: Path) -> None:
    code = (
        f"{STEPS['pth']}\nimport sglang\n{BREAK}Patcher.module_ready = broken\n{STEPS['engine']}\nprint('served')"
    )
    result = run(stand_in, code)
    assert (result.returncode, result.stdout) == (0, "served\n"), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("mmlane: is off, the engine runs without it: OSError: made to fail")
    strict = run(stand_in, code, MMLANE_STRICT="1")
    assert (strict.returncode, strict.stdout) == (1, "")


def test_an_unexpected_failure_ends_a_child(stand_in: Path) -> None:
    """Also one whose target has begun: the engine imports some of its modules at the first image."""
    (stand_in / "worker.py").write_text(
        f"import sglang\ndef run_scheduler_process():\n  {BREAK.replace(chr(10), chr(10) + '  ')}"
        f"Patcher.module_ready = broken\n  {STEPS['engine']}\n  print('served')\n"
    )
    result = run(stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\n{CHILD}")
    assert result.stdout == "1\n", result.stderr
    *_, line = result.stderr.splitlines()
    assert "could not start in this process, whose peers may count on it: OSError: made to fail" in line


def test_a_package_whose_patches_cannot_be_loaded_is_named(stand_in: Path) -> None:
    (stand_in / "theirs.py").write_text("raise RuntimeError('mine')")
    result = run(stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\nprint('served')")
    assert result.returncode == 0 and "served" in result.stdout
    assert "the patches of theirs are left out: RuntimeError: mine" in result.stderr


def test_the_flags_are_in_the_engines_help_and_refused_where_they_come_too_late(stand_in: Path) -> None:
    code = (
        f"{STEPS['pth']}\nimport argparse, sglang.srt.server_args as s\n"
        "p = argparse.ArgumentParser(); s.ServerArgs.add_cli_args(p)\n"
        "print(p.format_help()); p.parse_args(WORDS)\n"
    )
    shown = run(stand_in, code.replace("WORDS", "[]"))
    assert shown.returncode == 0, shown.stderr
    for flag in ("--mmlane {lane,backport,off}", "--mmlane-disable ID[,ID...]", "--mmlane-strict"):
        assert flag in shown.stdout
    late = run(stand_in, code.replace("WORDS", "['--mmlane', 'off']"))
    assert late.returncode == 2 and "set the variable MMLANE instead" in late.stderr


def test_an_untested_engine_is_patched_and_called_untested(stand_in: Path) -> None:
    metadata(stand_in, "sglang", "0.9.0")
    (stand_in / "sglang-0.5.12.dist-info" / "METADATA").unlink()
    (stand_in / "sglang-0.5.12.dist-info" / "entry_points.txt").unlink()
    (stand_in / "sglang-0.5.12.dist-info").rmdir()
    result = run(
        stand_in, f"{STEPS['pth']}\n{STEPS['engine']}\nassert sglang.srt.entrypoints.engine.function(2) == 4"
    )
    assert result.returncode == 0, result.stderr
    assert "untested: newer than" in result.stderr
