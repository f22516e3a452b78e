"""What holds for every patch file."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import mmlane.lane
import mmlane_patches
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


# What is imported later all the same: the first when the engine has set up its metrics, the others in no engine.
LATER = {"mmlane_patches.metrics", "mmlane.cli", "mmlane.__main__"}


def test_a_process_that_has_loaded_its_plan_has_loaded_all_of_ours() -> None:
    """Nothing is left to be read from the installation once an engine runs: it may be gone, or another's."""
    pytest.importorskip("torch")
    code = (
        "import sys, mmlane.entry; from packaging.version import Version\n"
        "from mmlane import compat, engine, patching, settings\n"
        "here = engine.Engine(Version('0.5.12.post1'), None)\n"  # a release that gets every patch by name
        "patching.Patcher(compat.plan(compat.contributed()[0], here, settings.Settings())).load()\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {
        module.name
        for package in (mmlane, mmlane_patches, mmlane.lane)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    }
    assert ours - set(loaded) == LATER
    assert "sglang" not in loaded


@pytest.mark.parametrize(("id", "target"), TARGETS, ids=[f"{id}-{target.name}" for id, target in TARGETS])
def test_what_a_target_names_is_there(id: str, target: Target) -> None:
    pytest.importorskip("torch")
    replace = target.replace
    assert callable(pkgutil.resolve_name(replace) if isinstance(replace, str) else replace), id
