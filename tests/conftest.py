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


EVERY = tuple(map(str, matrix().engines))
USUAL = tuple(map(str, matrix().usual))
NEWEST = str(matrix().newest)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engines",
        default="usual",
        metavar="WHICH",
        help="releases for tests/engine, by the table: usual (those of `make test`), all, or V[,V...]",
    )
    parser.addoption(
        "--all-of",
        metavar="V",
        help=f"of the tests that --engines all selects, those of one release; {NO_RELEASE}: those that name none",
    )


NO_RELEASE = "no-release"

# Of the usual ones, those on which `make test` also starts the engine with the back-ports alone.
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
        known = [*EVERY, NO_RELEASE]
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
    marker = metafunc.definition.get_closest_marker("releases")
    wanted = named(*marker.args) if marker else []
    if "version" in metafunc.fixturenames:
        versions = {"usual": USUAL, "all": EVERY}.get(chosen) or chosen.split(",")
        if chosen == "usual":
            wanted = wanted[:1]
        metafunc.parametrize("version", [v for v in versions if not wanted or v in wanted], scope="session")
    elif wanted:
        metafunc.parametrize("release", wanted if chosen == "all" else wanted[:1])


def named(*releases: str) -> list[str]:
    """Each release once, in their order, "newest" as the table's. Raises for one that the table does not have."""
    found = list(dict.fromkeys(NEWEST if release == "newest" else release for release in releases))
    if unknown := [release for release in found if release not in EVERY]:
        raise pytest.UsageError(f"releases({unknown[0]!r}): wanted newest, or one of {', '.join(EVERY)}")
    return found
