"""compat_matrix.yaml against the published engines: every cell of it, and that the table is whole."""

from __future__ import annotations

import pytest
from packaging.version import Version

import mmlane_patches
from mmlane.compat import contributed, matrix, plan
from mmlane.engine import Engine
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
    assert set(cell.faults) == set(probes.faults(source, spec.id))
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
    assert [spec.id for spec in PATCHES] == list(MATRIX.rows)
    specs, problems = contributed(mmlane_patches)
    assert not problems
    assert specs[: len(PATCHES)] == PATCHES


def test_every_fault_has_a_probe_and_every_probe_a_fault() -> None:
    assert {id: set(row["faults"]) for id, row in MATRIX.rows.items()} == {
        id: set(of_one) for id, of_one in probes.PROBES.items()
    }


def test_releases_are_in_order_and_once() -> None:
    assert list(MATRIX.engines) == sorted(set(MATRIX.engines))
    assert list(MATRIX.usual) == sorted(set(MATRIX.usual) & set(MATRIX.engines))


@pytest.mark.parametrize("spec", PATCHES, ids=lambda spec: spec.id)
def test_the_usual_releases_use_every_target(spec: PatchSpec) -> None:
    """So that `make test` tries each in a real engine."""
    applied = [v for v in MATRIX.usual if (cell := spec.cell(v)) and cell.state == "apply"]
    for target in spec.targets:
        assert any(target.serves(version) for version in applied), target.path


@pytest.mark.parametrize("spec", PATCHES, ids=lambda spec: spec.id)
def test_row_is_well_formed(spec: PatchSpec) -> None:
    since = [cell.since for cell in spec.cells]
    assert since == sorted(set(since))
    assert set(since) <= set(MATRIX.engines), "a cell starts at a release that is not in `engines`"
    assert since[0] == MATRIX.oldest, "the oldest release has no cell"
    states = [cell.state for cell in spec.cells]
    assert "apply" in states, "a patch that is applied nowhere can be dropped"
    for fault in MATRIX.rows[spec.id]["faults"]:
        has = [fault in cell.faults for cell in spec.cells]
        assert sum(now != before for before, now in zip([False, *has], [*has, False], strict=True)) == 2, (
            f"{fault} went and came back: what came back is a fault of its own, with its own id"
        )
    assert spec.group and spec.why and spec.consequence and spec.drop_when
    named = [id for cell in spec.cells for id in cell.faults]
    assert set(named) == set(MATRIX.rows[spec.id]["faults"]), "a fault that no cell names"
    assert all(len(set(cell.faults)) == len(cell.faults) for cell in spec.cells)
    assert all(reference.removeprefix("#").isdigit() for reference in spec.upstream)


def test_published_releases_are_in_the_table() -> None:
    """Up to the newest that is: what came after it is for `make matrix-new`, and no reason to fail here."""
    try:
        known = published()
    except LookupError as silence:
        pytest.skip(str(silence))
    inside = [v for v in known if MATRIX.oldest <= v <= MATRIX.newest and not v.is_prerelease]
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
        (f"{MATRIX.newest}.post99", str(MATRIX.newest)),
        ("99.0.dev1", str(MATRIX.newest)),
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
    spec = PatchSpec("x", "", "", (), "", "x", (later, first), ())
    assert spec.cell(Version("0.5.9")) == first
    assert spec.cell(Version("0.5.10.post1")) == later
