"""What there is to install, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from devkit.wheels import wheel_source
from tests.conftest import NEWEST
from tests.install.environments import Place, link_requirements


@pytest.fixture(scope="session")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what mmlane requires."""
    return link_requirements(tmp_path_factory.mktemp("requirements") / "packages")


@pytest.fixture
def place(tmp_path: Path, plugin_wheel: Path, checkout: Path, requirements: Path) -> Callable[..., Place]:
    """A place for an environment with the newest engine's wheel, unpacked; or with another engine."""

    def make(engine: Path | None = None) -> Place:
        root = tmp_path / "place"
        root.mkdir()
        return Place(root, plugin_wheel, checkout, (engine or wheel_source(NEWEST), requirements))

    return make
