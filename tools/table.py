"""compat_matrix.yaml as the maintainers' commands see it: any file of its form, and the patches under it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml
from packaging.version import Version

from mmlane.compat import Matrix
from mmlane.patching import PatchSpec
from tools.releases import our_patches


def load(file: Path) -> Matrix:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    return Matrix(tuple(Version(str(version)) for version in raw["engines"]), raw["patches"])


def patches_under(matrix: Matrix) -> tuple[PatchSpec, ...]:
    """Our patches with the cells of that table."""
    return tuple(replace(spec, cells=matrix.spec(spec.id, targets=()).cells) for spec in our_patches())
