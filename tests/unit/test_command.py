"""The command `mmlane` as a whole: its help, and completion in a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["doctor", "serve", "status", "bench", "off", "on"]
SCRIPT = "import sys; from mmlane.cli import main; sys.argv[0] = 'mmlane'; main()"


def run(*words: str, module: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "mmlane"] if module else ["-c", SCRIPT]
    return subprocess.run(
        [sys.executable, *command, *words],
        env={**os.environ, "COLUMNS": "100", **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [(), *((command,) for command in COMMANDS if command != "serve")])
def test_h_is_help(words: tuple[str, ...]) -> None:
    short, long = run(*words, "-h"), run(*words, "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert "Usage: mmlane" in short.stdout and short.stdout == long.stdout


def test_help_names_every_command() -> None:
    shown = run("-h").stdout
    assert [command for command in COMMANDS if f"│ {command} " in shown] == COMMANDS


def completions(line: str) -> list[str]:
    """What bash is offered at the end of a line."""
    words = line.split(" ")
    done = run(_MMLANE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mmlane ", COMMANDS),
        ("mmlane st", ["status"]),
        ("mmlane doctor --js", ["--json"]),
        ("mmlane doctor --json --none --str", ["--strict"]),
        ("mmlane doctor --json --engine newest --str", ["--strict"]),
        ("mmlane off --a", ["--all"]),
        ("mmlane serve --mod", []),  # the engine's options are not known here
    ],
)
def test_a_shell_can_complete_a_line(line: str, offered: list[str]) -> None:
    assert completions(line) == offered


@pytest.mark.parametrize("module", [False, True])
def test_completion_is_for_the_script(module: bool, tmp_path: Path) -> None:
    shown = run("--show-completion", "bash", module=module)
    assert shown.returncode == 0 and "complete -o default -F _mmlane_completion mmlane" in shown.stdout
    bashrc = tmp_path / ".bashrc"
    installed = run("--install-completion", "bash", module=module, HOME=str(tmp_path))
    assert installed.returncode == 0, installed.stderr
    words = shlex.split(bashrc.read_text())
    assert Path(words[-1]).name == "mmlane.sh" and "_MMLANE_COMPLETE" in Path(words[-1]).read_text()
