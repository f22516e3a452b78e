"""compat_matrix.yaml against the published engines: every cell of it, and that the table is whole."""

from __future__ import annotations

import pytest
from packaging.version import Version

import mmlane_patches
from mmlane.compat import contributed, matrix, plan
from mmlane.engine import ROLES, Engine
from mmlane.engine.source import EngineSource
from mmlane.patching import Cell, PatchSpec, Target, check
from mmlane.settings import Settings
from tools import probes
from tools.releases import our_patches, published

PATCHES = our_patches()
MATRIX = matrix()


@pytest.mark.parametrize("spec", PATCHES, ids=lambda spec: spec.id)
def test_cell_tells_the_truth(engine: Engine, source: EngineSource, spec: PatchSpec) -> None:
    """Faults are exactly those that the cell names; where it says apply, there is where to apply it."""
    cell = spec.cell(engine.version)
    assert cell is not None
    assert probes.faults(source, spec.id) == probes.claimed(spec.id, cell)
    if cell.state == "apply":
        assert spec.targets_on(engine.version)
        for target in spec.targets_on(engine.version):
            check(target, source)


def test_plan_is_the_table(engine: Engine) -> None:
    """Nothing is skipped on a release that the table knows."""
    decisions = plan(PATCHES, engine, Settings())
    wanted = {"apply": "planned", "native": "native"}
    for spec in PATCHES:
        cell = spec.cell(engine.version)
        assert cell is not None
        decision = decisions[spec.id]
        assert (decision.state, decision.reason) == (wanted[cell.state], cell.reason)
        assert decision.targets == (spec.targets_on(engine.version) if cell.state == "apply" else ())


# --- the table is whole ------------------------------------------------------------------------------------


def test_every_row_is_a_patch_and_every_patch_a_row() -> None:
    assert {spec.id for spec in PATCHES} == set(MATRIX.rows) == set(probes.FAULTS)
    specs, problems = contributed(mmlane_patches)
    assert not problems
    assert [spec.id for spec in specs[: len(PATCHES)]] == [spec.id for spec in PATCHES]


def test_releases_are_in_order_and_once() -> None:
    assert list(MATRIX.engines) == sorted(set(MATRIX.engines))


@pytest.mark.parametrize("spec", PATCHES, ids=lambda spec: spec.id)
def test_row_is_well_formed(spec: PatchSpec) -> None:
    since = [cell.since for cell in spec.cells]
    assert since == sorted(set(since))
    assert set(since) <= set(MATRIX.engines), "a cell starts at a release that nobody has looked at"
    assert since[0] == MATRIX.engines[0], "the oldest release has no cell"
    states = [cell.state for cell in spec.cells]
    assert "apply" in states, "a patch that is applied nowhere can be dropped"
    assert states == sorted(states), "a fix that was lost again needs a word of explanation here"
    assert spec.roles <= {"main", "tokenizer", *ROLES.values()}
    assert spec.roles and spec.group and spec.why and spec.consequence and spec.drop_when
    assert all(reference.removeprefix("#").isdigit() for reference in spec.upstream)


def test_a_group_is_applied_by_the_same_processes() -> None:
    """A patch whose group is elsewhere could be half applied."""
    for spec in PATCHES:
        others = [other for other in PATCHES if other.group == spec.group and other is not spec]
        assert all(other.roles & spec.roles for other in others), spec.group


def test_published_releases_are_in_the_table() -> None:
    """Up to the newest that is: what came after it is for `make matrix-new`, and no reason to fail here."""
    try:
        known = published()
    except LookupError as silence:
        pytest.skip(str(silence))
    oldest, newest = MATRIX.engines[0], MATRIX.engines[-1]
    inside = [version for version in known if oldest <= version <= newest and not version.is_prerelease]
    assert [str(version) for version in inside if not MATRIX.knows(version)] == []


# --- which cell, which target: versions that are easily got wrong ------------------------------------------


@pytest.mark.parametrize(
    ("given", "like"),
    [
        ("0.5.10.post1", "0.5.10"),
        ("0.5.11.dev3", "0.5.10.post1"),
        ("0.5.13rc1", "0.5.12.post1"),
        ("0.5.15.dev0", "0.5.14"),
        ("0.5.12+cu128", "0.5.12"),
        ("0.5.13+cu128", "0.5.13"),
        ("0.5.12.post1+fork.2", "0.5.12.post1"),
        ("0.5.24", "0.5.23"),
        ("0.6.0.dev1", "0.5.23"),
    ],
)
def test_cell_of_a_version_that_is_not_in_the_table(given: str, like: str) -> None:
    for spec in PATCHES:
        assert spec.cell(Version(given)) == spec.cell(Version(like)), spec.id


def test_no_cell_below_the_oldest() -> None:
    assert [spec.cell(Version(old)) for spec in PATCHES for old in ("0.5.8.post1", "0.5.9rc1")] == [
        None for _ in range(2 * len(PATCHES))
    ]


@pytest.mark.parametrize("given", ["0.5.10", "0.5.10+cu128", "0.5.10.post1", "0.5.11.dev3", "0.5.11rc1"])
def test_before_takes_post_and_development_releases(given: str) -> None:
    """`==0.5.10` would reject 0.5.10.post1, and a specifier set 0.5.11.dev3; neither has what 0.5.11 brought."""
    old = Target("module", "name", "()", lambda original: original, before="0.5.11")
    new = Target("module", "name", "()", lambda original: original, since="0.5.11")
    assert old.serves(Version(given))
    assert not new.serves(Version(given))


@pytest.mark.parametrize("given", ["0.5.11", "0.5.11+cu128", "0.5.11.post1", "0.5.12.dev1", "0.5.24"])
def test_since_takes_everything_later(given: str) -> None:
    old = Target("module", "name", "()", lambda original: original, before="0.5.11")
    new = Target("module", "name", "()", lambda original: original, since="0.5.11")
    assert new.serves(Version(given))
    assert not old.serves(Version(given))


def test_cells_in_any_order() -> None:
    first = Cell(Version("0.5.9"), "apply", "")
    later = Cell(Version("0.5.10"), "native", "")
    spec = PatchSpec("x", "", "", (), "", "x", frozenset({"main"}), (later, first), ())
    assert spec.cell(Version("0.5.9")) == first
    assert spec.cell(Version("0.5.10.post1")) == later
