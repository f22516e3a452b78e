"""compat_matrix.yaml -> which patch does what on which engine version; and from that a plan for one engine."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
import yaml
from packaging.version import Version

from mmlane import hookspecs
from mmlane.patching import Cell, Decision, PatchSpec, Refusal, Target, check, propagate_skips
from mmlane.problem import Problem, python
from mmlane.settings import Settings

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from mmlane.engine import Engine

MATRIX = "compat_matrix.yaml"


@dataclass(frozen=True)
class Matrix:
    """The table: the engine releases that it was checked against, oldest first, and its rows by patch id.

    usual: the releases on which `make test` starts the engine, the newest among them.
    """

    engines: tuple[Version, ...]
    usual: tuple[Version, ...]
    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, file: Traversable) -> Matrix:
        """Read a file in the form of compat_matrix.yaml. Raises `OSError`, `KeyError` and what YAML raises."""
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
        engines, usual = (tuple(Version(str(v)) for v in raw[key]) for key in ("engines", "usual"))
        return cls(engines, (*usual, max(engines)), raw["patches"])

    @property
    def oldest(self) -> Version:
        return min(self.engines)

    @property
    def newest(self) -> Version:
        return max(self.engines)

    def knows(self, version: Version) -> bool:
        return version in self.engines

    def spec(self, id: str, *, targets: tuple[Target, ...], relies_on: tuple[str, ...] = ()) -> PatchSpec:
        """The patch whose row is `id`, with the engine objects that its file replaces, and what it relies on.

        Raises `ValueError` where a cell of the row is not as it must be.
        """
        row = self.rows[id]
        return PatchSpec(
            id=id,
            why=row["why"],
            consequence=row["consequence"],
            upstream=tuple(row["upstream"]),
            drop_when=row["drop_when"],
            group=row["group"],
            cells=tuple(_cell(id, str(since), cell, row["faults"]) for since, cell in row["cells"].items()),
            targets=targets,
            modes=frozenset(row.get("modes", ("lane", "backport"))),
            needs=frozenset(row.get("needs", ())),
            relies_on=relies_on,
        )


def _cell(patch: str, since: str, raw: Mapping[str, Any], faults: Mapping[str, str]) -> Cell:
    """`native` and how the engine does it, or `apply` and ids of faults, for which `faults` has the phrases."""
    match list(raw.items()):
        case [("native", str(reason))]:
            return Cell(Version(since), "native", reason)
        case [("apply", [_, *_] as ids)] if set(ids) <= set(faults):
            return Cell(Version(since), "apply", "; ".join(faults[id] for id in ids), tuple(ids))
    wanted = f"native and a sentence, or apply and some of {', '.join(faults)}"
    raise ValueError(f"{MATRIX}: {patch}, {since}: wanted {wanted}; found {dict(raw)}")


@lru_cache(maxsize=1)
def matrix() -> Matrix:
    """The table that belongs to this installation: beside the package in a wheel, at the top of a checkout."""
    package = importlib.resources.files(hookspecs.__package__)  # in a directory, or in a zip archive
    for file in (package / MATRIX, Path(__file__).parent.parent.parent / MATRIX):
        if file.is_file():
            return Matrix.load(file)
    raise FileNotFoundError(f"{MATRIX} is neither in {package} nor at the top of a checkout; reinstall mmlane")


def contributed(ours: object) -> tuple[tuple[PatchSpec, ...], tuple[Problem, ...]]:
    """Every patch there is, those of `ours` first, and a problem for each package whose patches cannot be had.

    Other packages contribute through the entry-point group `mmlane`; see `mmlane.hookspecs`.
    """
    problems: list[Problem] = []
    specs: dict[str, PatchSpec] = {}
    for name, plugin, package in [("mmlane", ours, ""), *_others(problems)]:
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(plugin, name)
            theirs = [spec for contribution in manager.hook.mmlane_patches() for spec in contribution]
            for spec in theirs:
                if spec.id in specs:
                    raise ValueError(f"a patch called {spec.id} is there already")
                if not spec.cells or not spec.targets:
                    raise ValueError(f"{spec.id} has no cells, or no targets")
        except Exception as error:  # another package's code: named, and the engine starts without it
            if plugin is ours:
                raise
            problems.append(_left_out(name, error, package))
            continue
        specs.update((spec.id, spec) for spec in theirs)
    return tuple(specs.values()), tuple(problems)


def _others(problems: list[Problem]) -> Iterator[tuple[str, object, str]]:
    """Name, plugin and package of each other contribution."""
    for point in importlib.metadata.entry_points(group=hookspecs.PROJECT):
        package = point.dist.name if point.dist is not None else point.name
        try:
            yield point.name, point.load(), package
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(_left_out(point.name, error, package))


def _left_out(name: str, error: Exception, package: str) -> Problem:
    return Problem(
        f"the patches of {name} are left out: {type(error).__name__}: {error}; update {package}, or take it away:",
        python("-m", "pip", "uninstall", package),
    )


def plan(specs: Iterable[PatchSpec], engine: Engine, settings: Settings) -> dict[str, Decision]:
    """Decide, before anything is imported, what becomes of each patch on this engine.

    A group of which one patch cannot be applied, or was turned off, is skipped as a whole.
    """
    decisions = {spec.id: _decide(spec, engine, settings) for spec in specs}
    propagate_skips(decisions)
    return decisions


def _decide(spec: PatchSpec, engine: Engine, settings: Settings) -> Decision:
    # An engine of unknown version is a checkout: more likely new than old. Its source decides what fits.
    version = engine.version if engine.version_known else matrix().newest
    cell = spec.cell(version)
    if cell is None:
        oldest = min(cell.since for cell in spec.cells)
        return Decision(spec, "skipped", f"sglang {version} is older than {oldest}, the oldest supported")
    if cell.state == "native":
        return Decision(spec, "native", cell.reason)
    if settings.mode not in spec.modes:
        return Decision(spec, "skipped", f"MMLANE={settings.mode}", chosen=True)
    if spec.id in settings.disable:
        return Decision(spec, "skipped", "turned off by MMLANE_DISABLE", chosen=True)
    targets = spec.targets_on(version)
    if not targets:
        return Decision(spec, "skipped", f"no target is known on sglang {version}")
    if engine.source is not None:
        for target in targets:
            try:
                check(target, engine.source)
            except Refusal as refusal:
                return Decision(spec, "skipped", str(refusal))
    return Decision(spec, "planned", cell.reason, targets)
