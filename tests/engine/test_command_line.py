"""mmlane's flags on the engine's own command lines, and what strict and a wrong value do there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from devkit.environment import engine_environment

pytestmark = pytest.mark.engine

ONE = "0.5.12.post1"  # for what does not differ from release to release
SERVE = "import sys; from sglang.cli.main import main; sys.argv[0] = 'sglang'; main()"


def run(version: str, wheel: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    python = engine_environment(version, plugin=wheel).python
    return subprocess.run(
        [str(python), *words],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(Path.home()), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("command", [["-m", "sglang.launch_server"], ["-c", SERVE, "serve"]])
def test_the_engines_help_shows_the_flags(plugin_wheel: Path, command: list[str]) -> None:
    shows_the_flags(run(ONE, plugin_wheel, *command, "--help"))


def shows_the_flags(shown: subprocess.CompletedProcess[str]) -> None:
    assert shown.returncode == 0, shown.stderr[-3000:]
    for flag in ("--mmlane {arena,backport,off}", "--mmlane-disable ID[,ID...]", "--mmlane-strict"):
        assert flag in shown.stdout


@pytest.mark.parametrize("command", [["-m", "sglang.launch_server"], ["-c", SERVE, "serve"]])
def test_a_wrong_value_is_refused_with_the_right_ones(plugin_wheel: Path, command: list[str]) -> None:
    refused = run(ONE, plugin_wheel, *command, "--model-path", "x", "--mmlane", "on")
    assert refused.returncode == 1
    assert "MMLANE=on is not one of: arena, backport, off" in refused.stderr


UNDONE = """
import argparse, importlib, sys
names = ("mm_utils", "io_struct", "tokenizer_manager", "scheduler")
modules = [importlib.import_module(f"sglang.srt.managers.{name}") for name in names]
from mmlane import entry
replaced = [r for d in entry.session.patcher.decisions.values() for r in d.replaced]
assert replaced and all(r.in_force() for r in replaced)
holders = [(m, k, r) for r in replaced for m in list(sys.modules.values()) if m is not None
           and getattr(m, "__name__", "").startswith("sglang") for k, v in list(vars(m).items())
           if v is r.installed]
entry.stop()
def engines_own(r):  # below the patches that wrap each other
    under = [other for other in replaced if other.installed is r.original]
    return engines_own(under[0]) if under else r.original
for r in replaced:
    assert vars(r.owner)[r.attribute] is engines_own(r), r.target.path
for module, key, r in holders:
    assert vars(module)[key] is engines_own(r), (module, key)
entry.start("again")
assert all(r.in_force() for d in entry.session.patcher.decisions.values() for r in d.replaced)
parser = argparse.ArgumentParser()
sys.modules["sglang.srt.server_args"].ServerArgs.add_cli_args(parser)
print(parser.format_help())
print("undone", len(replaced), "held elsewhere", len(holders))
"""


def test_undo_restores_the_engines_own_objects(version: str, plugin_wheel: Path) -> None:
    result = run(version, plugin_wheel, "-c", UNDONE)
    assert "undone" in result.stdout
    shows_the_flags(result)


def test_strict_stops_the_engine_before_it_serves(plugin_wheel: Path, tmp_path: Path) -> None:
    """Another plugin holds a target: with MMLANE_STRICT=1 the engine does not start, and says why."""
    taker = (
        "import sglang.srt.managers.io_struct as io\n"
        "def _handle_parallel_sampling(self): pass\n"
        "import mmlane.entry; mmlane.entry.stop()\n"
        "io.GenerateReqInput._handle_parallel_sampling = _handle_parallel_sampling\n"
        "mmlane.entry.register()\n"
        "print('served')\n"
    )
    (tmp_path / "taker.py").write_text(taker)
    refused = run(ONE, plugin_wheel, str(tmp_path / "taker.py"), MMLANE_STRICT="1")
    assert refused.returncode == 1 and "served" not in refused.stdout
    assert "GenerateReqInput._handle_parallel_sampling is already replaced by" in refused.stderr
    lenient = run(ONE, plugin_wheel, str(tmp_path / "taker.py"))
    assert lenient.returncode == 0 and "served" in lenient.stdout, lenient.stderr[-3000:]
    assert "skipped fan_out_images" in lenient.stderr


def test_nothing_is_patched_when_off(plugin_wheel: Path) -> None:
    code = "import sys, sglang.srt.managers.mm_utils as m; print(m.ShmPointerMMData.__init__.__module__)"
    off = run(ONE, plugin_wheel, "-c", code, MMLANE="off")
    assert off.stdout.split()[-1] == "sglang.srt.managers.mm_utils"
    assert "mmlane:" not in off.stderr
    on = run(ONE, plugin_wheel, "-c", code)
    assert on.stdout.split()[-1] == "mmlane_patches.pointer"
