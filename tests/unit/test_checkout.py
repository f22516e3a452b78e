"""What files of the checkout say: pre-commit does what `make lint` does, and how `make coverage` ends."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml


def test_the_hooks_are_the_parts_of_make_lint(checkout: Path) -> None:
    (lint,) = re.findall(r"^lint: (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    (repo,) = yaml.safe_load((checkout / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # no second set of tools
    assert [hook["entry"] for hook in repo["hooks"]] == [f"make {part}" for part in lint.split()]
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


@pytest.mark.parametrize(("failing", "status"), [("none", 0), ("tests/unit", 2), ("report", 2)])
def test_coverage_reports_in_any_case_and_ends_as_the_tests_do(
    checkout: Path, tmp_path: Path, failing: str, status: int
) -> None:
    shutil.copy(checkout / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements-dev.txt", "requirements-test.txt", "installed", "ready"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in *{failing}*) exit 1;; esac\n')
    python.chmod(0o755)
    variables = [f"RUN={python}", "INSTALLED=installed", "READY=ready"]
    done = subprocess.run(
        ["make", "--silent", "coverage", *variables], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    ran = [line.split()[3:] for line in done.stdout.splitlines() if line.startswith("ran -m coverage")]
    assert [words[3] for words in ran if words[0] == "run"] == ["tests/unit", "tests/lane", "tests/contract"]
    assert [words[0] for words in ran[3:]] == ["combine", "html", "report"]
