"""Engine releases to look at: those of the table, a wheel, an unpacked tree, and what is published."""

from __future__ import annotations

import re
import zipfile
from functools import cache
from pathlib import Path

import pluggy
from packaging.version import Version

import mmlane_patches
from devkit.installer import InstallError, host_python, run
from devkit.wheels import wheel_source
from mmlane import hookspecs
from mmlane.engine import DISTRIBUTION, Engine
from mmlane.patching import PatchSpec


@cache
def release(version: Version) -> Engine:
    """A published release, downloaded if need be. One object a version, so that each file is parsed once."""
    return Engine(version, wheel_source(str(version)))


def local(path: Path, version: Version | None, scratch: Path) -> Engine:
    """An engine from a wheel (unpacked under `scratch`) or from a directory that holds the package `sglang`."""
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            archive.extractall(scratch, [n for n in archive.namelist() if n.endswith((".py", "METADATA"))])
        path = scratch
    if not (path / "sglang").is_dir():
        raise FileNotFoundError(f"{path} holds no package `sglang`")
    if version is None:
        named = [re.fullmatch(rf"{DISTRIBUTION}-(.+)\.dist-info", entry.name) for entry in path.iterdir()]
        versions = [match.group(1) for match in named if match]
        if len(versions) != 1:
            raise FileNotFoundError(f"{path} does not say which version it is; give it with --version")
        version = Version(versions[0])
    return Engine(version, path)


@cache
def our_patches() -> tuple[PatchSpec, ...]:
    """The patches of this repository alone, whatever else is installed."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(mmlane_patches)
    return tuple(spec for contribution in manager.hook.mmlane_patches() for spec in contribution)


def published() -> list[Version]:
    """Every release that the package index has. Raises `LookupError` when it gives no answer."""
    options = ("-m", "pip", "--disable-pip-version-check", "--no-input", "index", "versions", DISTRIBUTION)
    try:
        answer = run([host_python(), *options])
    except InstallError as error:
        raise LookupError(f"the package index gave no answer: {error}") from error
    listed = re.search(r"^Available versions: (.+)$", answer, re.MULTILINE)
    if listed is None:
        raise LookupError(f"the package index gave an unfamiliar answer: {answer[:300]}")
    return sorted(Version(word) for word in listed.group(1).split(", "))
