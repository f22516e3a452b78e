"""`python -m tools.dist [DIRECTORY]`: the files of a release, in dist/: an sdist, and the wheel of this checkout.

Both are checked as the package index checks them (`twine check --strict`), and a wheel that is built from the
sdist has to hold the same files with the same bytes. Exit status 1: it does not, or the check failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def build(source: Path, out: Path, *kinds: str) -> list[Path]:
    """Build what `kinds` names, `--sdist` or `--wheel`, with the hatchling of this environment, which is pinned.

    Raises CalledProcessError.
    """
    known = set(out.glob("*"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(source)]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return sorted(set(out.glob("*")) - known)


def unpacked(sdist: Path, scratch: Path) -> Path:
    """The one directory in an sdist, unpacked under `scratch`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    (root,) = scratch.iterdir()
    return root


def contents(wheel: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the mode of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: (archive.read(info), info.external_attr) for info in archive.infolist()}


def differences(one: Path, other: Path) -> list[str]:
    """A line for each file that only one of two wheels has, or that is not the same in both."""
    first, second = contents(one), contents(other)
    lines = [f"only in {one}: {name}" for name in sorted(first.keys() - second.keys())]
    lines += [f"only in {other}: {name}" for name in sorted(second.keys() - first.keys())]
    both = sorted(first.keys() & second.keys())
    return lines + [f"differs: {name}" for name in both if first[name] != second[name]]


def main(arguments: list[str] | None = None, source: Path = CHECKOUT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.dist", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=CHECKOUT / "dist")
    out: Path = parser.parse_args(arguments).directory
    if out.is_dir() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: what is in it would be released as well")
    out.mkdir(parents=True, exist_ok=True)
    (sdist,) = build(source, out, "--sdist")
    (wheel,) = build(source, out, "--wheel")
    twine = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    if subprocess.run(twine, check=False).returncode != 0:
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "wheel"
        (again,) = build(unpacked(sdist, Path(scratch) / "sdist"), place, "--wheel")
        found = differences(wheel, again)
    for line in found:
        print(line)
    print(f"{wheel.name}: the sdist builds {'another wheel' if found else 'the same wheel'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
