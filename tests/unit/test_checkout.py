"""What files of the checkout say of each other, and that what CONTRIBUTING.md says can be run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import USUAL


def test_the_hooks_are_the_parts_of_make_lint(checkout: Path) -> None:
    (lint,) = re.findall(r"^lint: (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    (repo,) = yaml.safe_load((checkout / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # no second set of tools
    assert [hook["entry"] for hook in repo["hooks"]] == [f"make {part}" for part in lint.split()]
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


def test_engine_tests_of_one_release_can_be_asked_for(checkout: Path) -> None:
    """Also of one that some tests are not for."""
    command = [sys.executable, "-m", "pytest", "tests/engine", "--collect-only", "-q", "--engines"]
    (other,) = set(re.findall(r"--engines (\S+?)[`;]", (checkout / "CONTRIBUTING.md").read_text()))
    for release in (other, USUAL[0]):
        found = subprocess.run([*command, release], cwd=checkout, capture_output=True, text=True, check=True)
        assert f"test_metrics_before_the_first_image[{release}]" in found.stdout


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
