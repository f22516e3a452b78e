"""What the tests of the lane in real processes share."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from mmlane.lane import Lane, cuda
from tests.lane.harness.child import start_server
from tests.lane.harness.fake_cuda import FakeGpu
from tests.lane.harness.lane_with_readers import SEGMENT, LaneWithReaders, lane_with_readers
from tests.lane.harness.peers import Company

_failed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=float, metavar="SECONDS", help="how long tests/lane/test_soak.py goes on")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: else one of them begins last, and all others wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_failed] = report.failed
    return report


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    """The server of processes is there before a test counts what it has open."""
    start_server()


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A stand-in for each device that a reader or a producer has from now on."""
    fake = FakeGpu()
    monkeypatch.setattr(cuda, "Cuda", fake)
    return fake


@pytest.fixture
def pair() -> Iterator[LaneWithReaders]:
    """A lane of 16 segments and its reader, in this process; nothing is out in the end."""
    with lane_with_readers() as pair:
        yield pair
        pair.wait_until_nothing_is_out()


@pytest.fixture
def wide() -> Iterator[LaneWithReaders]:
    """As `pair`, with room for whatever a test puts; nothing may be out at its end, without any wait."""
    with lane_with_readers(capacity=64 * SEGMENT) as wide:
        yield wide
        assert wide.nothing_is_out()


@pytest.fixture(scope="session")
def large() -> Iterator[LaneWithReaders]:
    """For what leaves nothing behind: a lane for many tests."""
    with lane_with_readers(capacity=1024 * SEGMENT) as pair:
        yield pair


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane that waits for a reader."""
    with Lane({"tp": 1}, capacity=32 << 20) as lane:
        yield lane
