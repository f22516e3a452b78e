"""Servers that tests share: one a release and mode, never two at once; and what releases do without the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EVERY, WITHOUT_LANE
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

# The modes with a server for each release, in the order in which they have theirs, and who uses it in which order.
MODES = ("backport", "lane")
ON_A_SERVER = ("test_release", "test_release_backport", "test_release_lane", "test_soak", "test_server_ends")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transcripts",
        choices=("read", "anew"),
        default="read",
        help="what releases do without the plugin: as it is written, or run again, compared and written",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start their own servers first; then release by release, those that share a server together."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    positions = iter(sorted(ours, key=_place))
    items[:] = [next(positions) if item in ours else item for item in items]


def _place(item: pytest.Item) -> tuple[int, ...]:
    assert isinstance(item, pytest.Function)
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("version") not in EVERY:  # none, or one is skipped because none was chosen
        return (0,)
    release = EVERY.index(parameters["version"])
    mode = parameters.get("mode") or next((mode for mode in MODES if f"{mode}_server" in item.fixturenames), None)
    if mode is None:
        return (1, release, 0)
    if item.path.stem not in ON_A_SERVER:
        raise pytest.UsageError(f"{item.nodeid} uses the server of other tests: name its file in ON_A_SERVER")
    return (1, release, 1 + MODES.index(mode), ON_A_SERVER.index(item.path.stem))


@pytest.fixture(scope="session")
def transcripts(request: pytest.FixtureRequest) -> Transcripts:
    return Transcripts(anew=request.config.getoption("--transcripts") == "anew")


@pytest.fixture(scope="session")
def unpatched(version: str, transcripts: Transcripts) -> Any:
    """What the release does without the plugin: tests/engine/unpatched/plain.py."""
    return transcripts.of(version, plain)


@pytest.fixture(scope="session")
def backport_server(
    version: str, unpatched: Any, plugin_wheel: Path, request: pytest.FixtureRequest
) -> Iterator[WatchedServer]:
    """A release with the back-ports alone."""
    if request.config.getoption("--engines") == "usual" and version not in WITHOUT_LANE:
        pytest.skip("the back-ports alone: with --engines all, or naming this release")
    end_the_one_before()
    env = {"MMLANE": "backport", "MMLANE_LOG": "debug"}
    with WatchedServer(version, plugin=plugin_wheel, env=env) as server:
        _running.append(server)
        yield server


@pytest.fixture(scope="session")
def lane_server(version: str, unpatched: Any, plugin_wheel: Path) -> Iterator[WatchedServer]:
    """A release as a user has it, with the plugin installed and no mode chosen."""
    end_the_one_before()
    with WatchedServer(
        version,
        probes=["collectives", "held", "uncollected"],
        plugin=plugin_wheel,
        args=["--enable-metrics"],
        env={"MMLANE_LOG": "debug"},
    ) as server:
        _running.append(server)
        yield server


@pytest.fixture
def server(version: str, mode: str, request: pytest.FixtureRequest) -> WatchedServer:
    """That of a mode."""
    found: WatchedServer = request.getfixturevalue(f"{mode}_server")
    return found


# Fixtures of a session live until the release changes, and two servers do not.
_running: list[WatchedServer] = []


def end_the_one_before() -> None:
    while _running:
        _running.pop().stop()
