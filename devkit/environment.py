"""Real virtual environments with a real engine, one per engine version, sharing one base.

Layers below the cache root, each a virtual environment that sees the ones under it:

    overlays/<version>-<hash of the plugin's wheel>/   the plugin, installed as a user would
    engines/<version>/                                 sglang, its transformers, the CPU stand-ins
    base-<hash>/                                       torch and everything else the engine imports

The base is 3 GB and made once; an engine adds seconds. An overlay's own site-packages holds the plugin,
so that Python's `site` runs the plugin's .pth file in every process of the engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from devkit import cpu_engine
from devkit.cache import build_once, cache_root, digest
from devkit.installer import create_venv, pip, put_on_top_of, site_packages, venv_python
from devkit.wheels import wheel_source

_REQUIREMENTS = Path(__file__).with_name("requirements.txt")

# transformers refuses to be imported beside another huggingface_hub or tokenizers than it was made for.
_COMPANIONS = {
    "4.57.1": ("huggingface_hub==0.36.2", "tokenizers==0.22.2"),
    "5.3.0": ("huggingface_hub==1.11.0", "tokenizers==0.22.2"),
    "5.6.0": ("huggingface_hub==1.11.0", "tokenizers==0.22.2"),
    "5.8.1": ("huggingface_hub==1.11.0", "tokenizers==0.22.2"),
    "5.12.1": ("huggingface_hub==1.11.0", "tokenizers==0.22.2"),
    "5.19.0": ("huggingface_hub==2.4.0", "tokenizers==0.23.2"),
}


@dataclass(frozen=True)
class Environment:
    """An installed engine (with or without the plugin) that can be run."""

    version: str
    python: Path
    site_packages: Path
    root: Path


def engine_environment(version: str, *, plugin: Path | None = None) -> Environment:
    """The environment for one engine version, built if need be; `plugin` is the path of a wheel."""
    root = _engine(version)
    if plugin is not None:
        root = _overlay(version, root, plugin)
    return Environment(version, venv_python(root), site_packages(root), root)


def disposable_environment(version: str, plugin: Path, root: Path) -> Environment:
    """The same, with the plugin in a new directory `root` of its own, so that it can be damaged."""
    _install(plugin, root, _engine(version))
    return Environment(version, venv_python(root), site_packages(root), root)


def base_environment() -> Path:
    """The shared layer: a virtual environment without any engine."""
    torchvision_ops = cpu_engine.TORCHVISION_OPS.read_bytes()
    made_from = digest(_REQUIREMENTS.read_bytes(), torchvision_ops)
    return build_once(cache_root() / f"base-{made_from}", made_from, _build_base)


def _build_base(root: Path) -> None:
    lines = _REQUIREMENTS.read_text().splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    create_venv(root, with_pip=True)
    pip(root, "install", torch)
    pip(root, "install", "--no-deps", "-r", _REQUIREMENTS)
    cpu_engine.mend_torchvision(site_packages(root))


def _engine(version: str) -> Path:
    base = base_environment()
    transformers = pinned(wheel_source(version), "transformers")
    companions = _COMPANIONS.get(transformers)
    if companions is None:
        raise LookupError(f"engine {version} wants transformers {transformers}: add it to {__file__}")
    packages = (f"sglang=={version}", f"transformers=={transformers}", *companions)

    def build(root: Path) -> None:
        create_venv(root, with_pip=False)
        pip(base, "install", "--no-deps", "--target", site_packages(root), *packages)
        put_on_top_of(root, base)
        cpu_engine.install(site_packages(root), version)

    made_from = digest(*packages, base.name, cpu_engine.fingerprint())
    return build_once(cache_root() / "engines" / version, made_from, build)


def _overlay(version: str, engine: Path, wheel: Path) -> Path:
    fingerprint = digest(wheel.read_bytes())
    path = cache_root() / "overlays" / f"{version}-{fingerprint}"
    made_from = digest(fingerprint, engine.name, base_environment().name)
    return build_once(path, made_from, lambda root: _install(wheel, root, engine))


def _install(wheel: Path, root: Path, engine: Path) -> None:
    base = base_environment()
    create_venv(root, with_pip=False)
    # Not --target: an ordinary installation is what runs the wheel's own .pth file and scripts.
    pip(base, "--python", venv_python(root), "install", "--no-deps", wheel)
    put_on_top_of(root, engine, base)


def pinned(source: Path, package: str) -> str:
    """The version of `package` that an unpacked engine wheel pins."""
    (metadata,) = source.glob("sglang-*.dist-info/METADATA")
    needs = HeaderParser().parsestr(metadata.read_text()).get_all("Requires-Dist", [])
    for need in needs:
        match = re.fullmatch(rf"{package}==([^;\s]+)", need)
        if match:
            return match.group(1)
    raise LookupError(f"{metadata} pins no {package}")
