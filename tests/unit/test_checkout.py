"""What files of the checkout say of each other: pre-commit does what `make lint` does."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


def test_the_hooks_are_the_parts_of_make_lint(checkout: Path) -> None:
    (lint,) = re.findall(r"^lint: (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    (repo,) = yaml.safe_load((checkout / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # no second set of tools
    assert [hook["entry"] for hook in repo["hooks"]] == [f"make {part}" for part in lint.split()]
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])
