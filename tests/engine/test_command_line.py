"""mmlane's flags on the engine's own command lines, and what strict and a wrong value do there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.environment import engine_environment
from tests.engine import forks

pytestmark = pytest.mark.engine

ONE = "0.5.12.post1"  # for what does not differ from release to release
SERVE = "import sys; from sglang.cli.main import main; sys.argv[0] = 'sglang'; main()"
COMMANDS = {"launch_server": ("-m", "sglang.launch_server"), "serve": ("-c", SERVE, "serve")}
SCRIPT = Path(__file__).with_name("stop_and_restart.py")
# Another plugin holds a target.
TAKER = """
import sglang.srt.managers.io_struct as io
def _handle_parallel_sampling(self): pass
import mmlane.entry; mmlane.entry.stop()
io.GenerateReqInput._handle_parallel_sampling = _handle_parallel_sampling
mmlane.entry.register()
print('served')
"""
POINTER = "import sys, sglang.srt.managers.mm_utils as m; print(m.ShmPointerMMData.materialize.__module__)"

Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def started(plugin_wheel: Path, taker: Path) -> dict[str, Ended]:
    """What a start decides needs a start of its own: these, as many at once as there are cores."""
    python = engine_environment(ONE, plugin=plugin_wheel).python
    wrong = ("--model-path", "x", "--mmlane", "on")

    def run(words: tuple[str, ...], env: Mapping[str, str]) -> Ended:
        return subprocess.run(
            [str(python), *words],
            env={**forks.ENV, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        starting = {
            **{f"{name} --help": pool.submit(run, (*words, "--help"), {}) for name, words in COMMANDS.items()},
            "strict": pool.submit(run, (str(taker),), {"MMLANE_STRICT": "1"}),
            "off": pool.submit(run, ("-c", POINTER), {"MMLANE": "off"}),
            **{f"{name} --mmlane on": pool.submit(run, (*words, *wrong), {}) for name, words in COMMANDS.items()},
        }
        return {name: future.result() for name, future in starting.items()}


@pytest.fixture(scope="module")
def taker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("scripts") / "taker.py"
    script.write_text(TAKER)
    return script


@pytest.mark.parametrize("command", COMMANDS)
def test_the_engines_help_shows_the_flags(started: dict[str, Ended], command: str) -> None:
    shows_the_flags(started[f"{command} --help"])


def shows_the_flags(shown: Ended) -> None:
    assert shown.returncode == 0, shown.stderr[-3000:]
    for flag in ("--mmlane {lane,backport,off}", "--mmlane-disable ID[,ID...]", "--mmlane-strict"):
        assert flag in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_is_refused_with_the_right_ones(started: dict[str, Ended], command: str) -> None:
    refused = started[f"{command} --mmlane on"]
    assert refused.returncode == 1
    assert "--mmlane on is not one of: lane, backport, off" in refused.stderr


def test_undo_restores_the_engines_own_objects(version: str, plugin_wheel: Path) -> None:
    result = forks.start(version, plugin_wheel, SCRIPT).result(300)
    assert "undone" in result.stdout, result.stderr[-3000:]
    shows_the_flags(result)


def test_strict_stops_the_engine_before_it_serves(
    started: dict[str, Ended], taker: Path, plugin_wheel: Path
) -> None:
    """Another plugin holds a target: with MMLANE_STRICT=1 the engine does not start, and says why."""
    refused = started["strict"]
    assert refused.returncode == 1 and "served" not in refused.stdout
    assert "GenerateReqInput._handle_parallel_sampling is already replaced by" in refused.stderr
    lenient = forks.start(ONE, plugin_wheel, taker).result(300)
    assert lenient.returncode == 0 and "served" in lenient.stdout, lenient.stderr[-3000:]
    assert "skipped fan_out_images" in lenient.stderr


def test_nothing_is_patched_when_off(started: dict[str, Ended], tmp_path: Path, plugin_wheel: Path) -> None:
    off = started["off"]
    assert off.stdout.split()[-1] == "sglang.srt.managers.mm_utils", off.stderr[-3000:]
    assert "mmlane:" not in off.stderr
    script = tmp_path / "pointer.py"
    script.write_text(POINTER)
    on = forks.start(ONE, plugin_wheel, script).result(300)
    assert on.stdout.split()[-1] == "mmlane.transport.pointer", on.stderr[-3000:]
