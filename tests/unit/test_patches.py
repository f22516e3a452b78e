"""What holds for every patch file."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

from mmlane.compat import contributed
from mmlane.patching import Target

TARGETS = [(spec.id, target) for spec in contributed()[0] for target in spec.targets]


def test_reading_the_patches_imports_neither_torch_nor_the_engine() -> None:
    """They are read before the engine has set up its environment."""
    code = "import sys; from mmlane.compat import contributed; contributed(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "mmlane_patches" in loaded
    assert not loaded & {"torch", "sglang", "numpy"}


@pytest.mark.parametrize(("id", "target"), TARGETS, ids=[f"{id}-{target.name}" for id, target in TARGETS])
def test_what_a_target_names_is_there(id: str, target: Target) -> None:
    pytest.importorskip("torch")
    replace = target.replace
    assert callable(pkgutil.resolve_name(replace) if isinstance(replace, str) else replace), id
