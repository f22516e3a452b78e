"""The tiny checkpoints that every engine version serves: real architectures, random weights.

Written once by `checkpoint_writer.py`, which runs in the base environment because it needs torch.
"""

from __future__ import annotations

from pathlib import Path

from devkit.cache import build_once, cache_root, digest
from devkit.environment import base_environment
from devkit.installer import run, venv_python

_WRITER = Path(__file__).with_name("checkpoint_writer.py")


def tiny_qwen2_vl() -> Path:
    """The directory of the usual checkpoint. The same bytes everywhere: fixed seed, fixed order."""
    return _tiny("qwen2_vl")


def tiny_qwen2_5_vl() -> Path:
    """The same for Qwen2.5-VL, which the engine can also split into pipeline stages."""
    return _tiny("qwen2_5_vl")


def _tiny(model: str) -> Path:
    made_from = digest(_WRITER.read_bytes())

    def build(root: Path) -> None:
        run([venv_python(base_environment()), _WRITER, root, model])

    name = f"tiny-{model.replace('_', '-')}-{made_from}"
    return build_once(cache_root() / "checkpoints" / name, made_from, build)
