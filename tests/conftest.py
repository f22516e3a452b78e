"""What every kind of test shares: where the checkout is, and a wheel built from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mmlane.compat import matrix

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top of this checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def plugin_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built the way a user's pip builds it."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(CHECKOUT)],
        check=True,
    )
    (wheel,) = out.glob("sglang_mmlane-*.whl")
    return wheel


# The releases on which `make test` starts the engine; `--engines all` takes every one in the table.
SIX = ("0.5.9", "0.5.10.post1", "0.5.12.post1", "0.5.14", "0.5.18", "0.5.23")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", default=",".join(SIX), help="engine releases for tests/engine: all, or V[,V...]")
    parser.addoption(
        "--all-of",
        metavar="V",
        help=f"of the tests that --engines all selects, those of one release; {NO_RELEASE}: those that name none",
    )


NO_RELEASE = "no-release"

# Those of the six on which it also starts it with the back-ports alone.
WITHOUT_LANE = ("0.5.9", "0.5.12.post1", "0.5.18")


@pytest.hookimpl(tryfirst=True)  # what --hypothesis-profile names is loaded after it
def pytest_configure(config: pytest.Config) -> None:
    register_profiles()
    take_all_of(config.getoption("--all-of"), config)


def register_profiles() -> None:
    """`usual`: the same examples in every run, so that a change is judged by what it changed. `thorough`: others.

    Neither minds how long an example takes: a machine that is busy is no fault.
    """
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("usual", patient, derandomize=True)
    settings.register_profile("thorough", patient, max_examples=1000, print_blob=True)
    settings.load_profile("usual")


def take_all_of(release: str | None, config: pytest.Config) -> None:
    if release:
        known = [*map(str, matrix().engines), NO_RELEASE]
        if release not in known:
            raise pytest.UsageError(f"--all-of {release}: wanted one of {', '.join(known)}")
        config.option.engines = "all"


def release_of(item: pytest.Item) -> str:
    """The release that a test is parametrized with."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(params.get("version", params.get("release", NO_RELEASE)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--all-of")
    if chosen:
        config.hook.pytest_deselected(items=[item for item in items if release_of(item) != chosen])
        items[:] = [item for item in items if release_of(item) == chosen]
    if config.getoption("--engines") != "all":
        for item in items:
            if item.get_closest_marker("matrix"):
                item.add_marker(pytest.mark.skip(reason="only with --engines all"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--engines")
    releases = metafunc.definition.get_closest_marker("releases")
    wanted = releases and (releases.args[:1] if chosen == ",".join(SIX) else releases.args)
    if "version" in metafunc.fixturenames:
        every = [str(version) for version in matrix().engines]
        versions = every if chosen == "all" else chosen.split(",")
        metafunc.parametrize("version", [v for v in versions if not wanted or v in wanted], scope="session")
    elif wanted:
        metafunc.parametrize("release", wanted if chosen == "all" else wanted[:1])
