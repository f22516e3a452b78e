"""What lets the real engine run without a GPU. Nothing of the engine itself is replaced.

- `platform/`: an out-of-tree platform, the engine's own extension point from 0.5.11 on.
- `standins/`: before 0.5.13, import-time stand-ins for compiled kernels; calling any of them raises.
  Each release sees only those it imports unconditionally: code that asks whether the kernels are
  installed must hear "no" wherever it can.
- `torchvision_ops.py`: operator schemas that torchvision's import expects from its compiled part.

These files are copied into the environments; this module does the copying. Only the environments have
torch and the engine, so only there can the copies be imported.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from devkit.cache import digest
from devkit.releases import release

_HERE = Path(__file__).parent
_PLATFORM = _HERE / "platform"
_STANDINS = _HERE / "standins"
TORCHVISION_OPS = _HERE / "torchvision_ops.py"

_FIRST_WITH_PLATFORMS = (0, 5, 11)
# Folder of stand-ins, first release that needs it, first release that no longer does.
_NEEDED_BY = (
    ("shared", (0, 0, 0), (0, 5, 13)),
    ("every_kernel", (0, 0, 0), (0, 5, 11)),
    ("host_cache_kernels", (0, 5, 11), (0, 5, 13)),
    ("rotary_fallback", (0, 0, 0), (0, 5, 13)),
)

_PLATFORM_PACKAGE = "mmlane_devkit_cpu"
_METADATA = f"Metadata-Version: 2.1\nName: {_PLATFORM_PACKAGE}\nVersion: 0\n"
_ENTRY_POINTS = f"[sglang.srt.platforms]\n{_PLATFORM_PACKAGE} = {_PLATFORM_PACKAGE}:activate\n"


def install(site_packages: Path, version: str) -> None:
    """Put into an engine's environment what that version needs, and only that."""
    for folder, first, end in _NEEDED_BY:
        if first <= release(version) < end:
            for package in (_STANDINS / folder).glob("*/__init__.py"):
                _copy(package.parent, site_packages / package.parent.name)
    if release(version) >= _FIRST_WITH_PLATFORMS:
        _install_platform(site_packages)


def _install_platform(site_packages: Path) -> None:
    _copy(_PLATFORM, site_packages / _PLATFORM_PACKAGE)
    info = site_packages / f"{_PLATFORM_PACKAGE}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA)
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def mend_torchvision(site_packages: Path) -> None:
    """Let torchvision be imported where its compiled operators do not fit the installed torch."""
    shutil.copy(TORCHVISION_OPS, site_packages / "mmlane_devkit_torchvision_ops.py")
    registrations = site_packages / "torchvision" / "_meta_registrations.py"
    registrations.write_text(f"import mmlane_devkit_torchvision_ops\n{registrations.read_text()}")


def fingerprint() -> str:
    """A hash of everything that `install` copies."""
    files = sorted([*_PLATFORM.rglob("*.py"), *_STANDINS.rglob("*.py")])
    return digest(_METADATA, _ENTRY_POINTS, *(f"{p.relative_to(_HERE)}\n{p.read_text()}" for p in files))
