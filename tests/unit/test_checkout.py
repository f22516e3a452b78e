"""What files of the checkout say of each other, and that what CONTRIBUTING.md says can be run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import SIX


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
    for release in (other, SIX[0]):
        found = subprocess.run([*command, release], cwd=checkout, capture_output=True, text=True, check=True)
        assert f"test_metrics_before_the_first_image[{release}]" in found.stdout
