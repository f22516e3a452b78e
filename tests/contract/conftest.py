"""The published engine releases, one after the other, so that each file of theirs is parsed once."""

from __future__ import annotations

import pytest

from mmlane.compat import matrix
from mmlane.engine import Engine
from mmlane.engine.source import EngineSource
from tools.releases import release


@pytest.fixture(scope="session", params=matrix().engines, ids=str)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each release of the table."""
    return release(request.param)


@pytest.fixture(scope="session")
def source(engine: Engine) -> EngineSource:
    assert engine.source is not None
    return engine.source
