"""The published engine wheels, unpacked for reading: what the contract tests check facts against."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from devkit.cache import build_once, cache_root, digest
from devkit.installer import PYTHON, host_python, run


def wheel_source(version: str) -> Path:
    """A directory with the Python sources and the metadata of one engine release; no dependencies."""

    def build(root: Path) -> None:
        with tempfile.TemporaryDirectory() as download:
            python = "{}.{}".format(*PYTHON)
            options = ["--no-deps", "--python-version", python, "--only-binary=:all:", "--dest", download]
            pip = [host_python(), "-m", "pip", "--disable-pip-version-check", "--no-input"]
            run([*pip, "download", *options, f"sglang=={version}"])
            (wheel,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
                archive.extractall(root, members=wanted)

    return build_once(cache_root() / "wheels" / version, version, build)


def wheel_digest(version: str) -> str:
    """A short hash of the release's wheel: of its list of files, which has the hash of each."""
    (record,) = wheel_source(version).glob("sglang-*.dist-info/RECORD")
    return digest(record.read_bytes())
