"""`python -m tools.matrix_new 0.5.24`: what the table would do with an engine release that it does not have yet.

For each patch: the cell that would hold, whether its targets are there, whether the faults are those that the
cell claims, and which bodies are not those of the release before. Exit status 1: a person has to look.
Without an engine: which published releases the table does not know.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from devkit.installer import InstallError
from mmlane.compat import Matrix, matrix
from mmlane.engine import Engine
from mmlane.engine.source import EngineSource
from mmlane.patching import Cell, PatchSpec, Refusal, check
from tools import bodies, probes, releases


@dataclass(frozen=True)
class Verdict:
    """One patch on the new engine: its cell, what a person has to look at, and what is merely worth knowing."""

    patch: str
    cell: Cell | None
    wanted: tuple[str, ...]
    notes: tuple[str, ...]


def judge(spec: PatchSpec, engine: Engine, changed: dict[str, str]) -> Verdict:
    """`changed` holds the bodies that differ from the release before."""
    cell = spec.cell(engine.version)
    if cell is None:
        return Verdict(spec.id, None, ("older than the oldest cell: not supported",), ())
    source = engine.source
    assert source is not None
    wanted = _against_probes(spec, cell, engine.version, source)
    read_again = [
        f"{what}: {path}" for path, what in changed.items() if path in bodies.paths(spec, engine.version)
    ]
    if cell.state == "native":
        return Verdict(spec.id, cell, tuple(wanted), tuple(read_again))
    targets = spec.targets_on(engine.version)
    if not targets:
        wanted.append("no target is known on this version: give the patch one")
    for target in targets:
        try:
            check(target, source)
        except Refusal as refusal:
            wanted.append(str(refusal))
    return Verdict(spec.id, cell, tuple(wanted + [f"read again, {line}" for line in read_again]), ())


def _against_probes(spec: PatchSpec, cell: Cell, version: Version, source: EngineSource) -> list[str]:
    try:
        found = probes.faults(source, spec.id)
    except probes.Unknown as unknown:
        return [f"neither fault nor fix was recognised: {unknown}"]
    lines = [f"the cell does not name a fault that is there: {id}" for id in found if id not in cell.faults]
    lines += [f"the cell names a fault that is gone: {id}" for id in cell.faults if id not in found]
    if lines and found:
        lines.append(f"add the cell {version}: {{apply: [{', '.join(found)}]}}")
    elif lines:
        lines.append(f'the engine has the fix: add the cell {version}: {{native: "..."}}')
        lines.append(f'add before="{version}" to the targets that have no `before`')
    return lines


def report(engine: Engine, known: Matrix) -> tuple[list[str], bool]:
    """The lines to print, and whether a person has to look at something."""
    is_known = known.knows(engine.version)
    before = max((version for version in known.engines if version <= engine.version), default=None)
    lines = [
        f"sglang {engine.version}: {'in the table' if is_known else f'not in the table; compared with {before}'}"
    ]
    changed = _changed(engine, before) if before else {}
    needed = []
    for verdict in (judge(spec, engine, changed) for spec in _patches_under(known)):
        lines.append("")
        cell = verdict.cell
        lines.append(f"{verdict.patch}: " + (f"{cell.since} {cell.state}: {cell.reason}" if cell else "no cell"))
        lines += [f"  ! {line}" for line in verdict.wanted]
        lines += [f"    {line}" for line in verdict.notes]
        if not verdict.wanted:
            lines.append("    holds")
        needed += [verdict.patch] if verdict.wanted else []
    lines.append("")
    lines.append(f"a person has to look at: {', '.join(needed)}" if needed else "nothing needs a person")
    if not is_known:
        then = f"make fingerprints table transcripts ONLY={engine.version}"
        lines.append(f"then add {engine.version} to `engines`, and run `{then}`")
    return lines, bool(needed)


def _patches_under(known: Matrix) -> list[PatchSpec]:
    """Our patches with the cells of that table."""
    return [replace(spec, cells=known.spec(spec.id, targets=()).cells) for spec in releases.our_patches()]


def _changed(engine: Engine, before: Version) -> dict[str, str]:
    """Bodies that are not as recorded for an earlier release, or for this one where it was looked at already."""
    assert engine.source is not None
    now = bodies.bodies(engine.source, bodies.all_paths(releases.our_patches()))
    recorded = bodies.recorded(bodies.load(), before)
    return bodies.differences({path: recorded.get(path) for path in now}, now)


def unknown_releases(known: Matrix) -> list[Version]:
    """Published releases, from the oldest supported one on, that the table does not have."""
    published = [version for version in releases.published() if not version.is_prerelease]
    return [version for version in published if version > known.oldest and not known.knows(version)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.matrix_new",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", nargs="?", help="a version, a wheel, or a directory that holds `sglang`")
    parser.add_argument("--version", type=Version, help="which version a directory is, where it does not say so")
    parser.add_argument("--table", type=Path, help="another file in the form of compat_matrix.yaml")
    options = parser.parse_args(arguments)
    known = Matrix.load(options.table) if options.table else matrix()
    if options.engine is None:
        try:
            unknown = unknown_releases(known)
        except LookupError as silence:
            raise SystemExit(str(silence)) from None
        print(f"published, but not in the table: {', '.join(map(str, unknown)) or 'none'}")
        return 1 if unknown else 0
    with tempfile.TemporaryDirectory() as scratch:
        lines, needed = report(_engine(options.engine, options.version, Path(scratch)), known)
    print(*lines, sep="\n")
    return 1 if needed else 0


def _engine(named: str, version: Version | None, scratch: Path) -> Engine:
    if not Path(named).exists():
        try:
            return releases.release(Version(named))
        except InvalidVersion:
            raise SystemExit(f"{named} is neither a version nor a wheel nor a directory") from None
        except InstallError as error:
            raise SystemExit(f"sglang {named} cannot be downloaded: {error}") from None
    return releases.local(Path(named), version, scratch)


if __name__ == "__main__":
    sys.exit(main())
