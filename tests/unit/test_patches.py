"""What holds for every patch file."""

from __future__ import annotations

import inspect
import itertools
import pkgutil
import subprocess
import sys

import pytest

import mmlane.engine
import mmlane.host
import mmlane.lane
import mmlane.patching
import mmlane.transport
import mmlane_patches
from mmlane.compat import contributed, matrix
from mmlane.patching import Target

TARGETS = [(spec.id, target) for spec in contributed(mmlane_patches)[0] for target in spec.targets]


def test_reading_the_patches_imports_neither_torch_nor_the_engine() -> None:
    """They are read before the engine has set up its environment."""
    code = (
        "import sys, mmlane_patches; from mmlane.compat import contributed; contributed(mmlane_patches)\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "mmlane_patches" in loaded
    assert not loaded & {"torch", "sglang", "numpy"}


PACKAGES = (mmlane, mmlane_patches, mmlane.engine, mmlane.host, mmlane.lane, mmlane.patching, mmlane.transport)
# What is imported later all the same: the first when the engine has set up its metrics, the others in no engine.
LATER = {
    "mmlane.engine.standalone",
    "mmlane.transport.metrics",
    "mmlane.bench",
    "mmlane.cli",
    "mmlane.launcher",
    "mmlane.__main__",
}


def test_a_process_that_has_loaded_its_plan_has_loaded_all_of_ours() -> None:
    """Nothing is left to be read from the installation once an engine runs: it may be gone, or another's."""
    pytest.importorskip("torch")
    code = (
        "import sys, mmlane.entry, mmlane_patches; from packaging.version import Version\n"
        "from mmlane import compat, engine, patching, settings\n"
        "here = engine.Engine(Version('0.5.12.post1'), None)\n"  # a release that gets every patch by name
        "specs, _ = compat.contributed(mmlane_patches)\n"
        "patching.Patcher(compat.plan(specs, here, settings.Settings())).load()\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {
        module.name
        for package in PACKAGES
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    }
    assert ours - set(loaded) == LATER
    assert "sglang" not in loaded


@pytest.mark.parametrize(("id", "target"), TARGETS, ids=[f"{id}-{target.name}" for id, target in TARGETS])
def test_what_a_target_names_is_there(id: str, target: Target) -> None:
    pytest.importorskip("torch")
    replace = target.replace
    assert callable(pkgutil.resolve_name(replace) if isinstance(replace, str) else replace), id


NAMED = [(id, named) for id, t in TARGETS for named in (t.replace, t.step) if isinstance(named, str)]


@pytest.mark.parametrize(("id", "named"), sorted(set(NAMED)))
def test_what_is_named_by_a_string_is_in_a_file_of_ours(id: str, named: str) -> None:
    """Every replacement and every step: defined there, and not merely imported, so that there is one name for it.

    Several patches that name one replacement share it only under the same name.
    """
    pytest.importorskip("torch")
    module, _, name = named.partition(":")
    assert module.partition(".")[0] in ("mmlane", "mmlane_patches"), id
    found = pkgutil.resolve_name(named)
    assert callable(found), id
    assert (found.__module__, found.__qualname__) == (module, name), id


def test_patches_of_one_function_share_its_replacement() -> None:
    """None of ours wraps another's: on each release, all that want a function have a step in one replacement."""
    paths: dict[str, list[Target]] = {}
    for _, target in TARGETS:
        paths.setdefault(target.path, []).append(target)
    for targets in paths.values():
        for one, other in itertools.combinations(targets, 2):
            if any(one.serves(version) and other.serves(version) for version in matrix().engines):
                assert one.shares(other), one.path


@pytest.mark.parametrize(("id", "target"), TARGETS, ids=[f"{id}-{target.name}" for id, target in TARGETS])
def test_a_step_comes_with_a_replacement_that_is_given_steps(id: str, target: Target) -> None:
    pytest.importorskip("torch")
    target.load()
    replace = pkgutil.resolve_name(target.replace) if isinstance(target.replace, str) else target.replace
    parameters = list(inspect.signature(replace).parameters)
    assert len(parameters) == (1 if target.step is None else 2), id
    step = target.load_step()
    assert (step is None) == (target.step is None)
    assert step is None or callable(step)
