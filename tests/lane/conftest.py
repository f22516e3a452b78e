"""What the tests of the lane in real processes share."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from tests.lane.processes import Company

_failed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=float, metavar="SECONDS", help="how long tests/lane/test_soak.py goes on")


def pytest_configure(config: pytest.Config) -> None:
    # The same examples in every run, so that a change is judged by what it changed; a longer soak looks further.
    settings.register_profile("mmlane", derandomize=config.getoption("--soak", None) is None)
    settings.load_profile("mmlane")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_failed] = report.failed
    return report


@pytest.fixture
def company(request: pytest.FixtureRequest) -> Iterator[Company]:
    """Processes, each of which ends well after a test that went well; not a trace of a lane is left then."""
    company = Company()
    try:
        yield company
        if not request.node.stash[_failed]:
            company.end()
    finally:
        company.put_down()
