"""The tiny Qwen2-VL checkpoint that every engine version serves: a real architecture, random weights.

Written once by `checkpoint_writer.py`, which runs in the base environment because it needs torch.
"""

from __future__ import annotations

from pathlib import Path

from devkit.cache import build_once, cache_root, digest
from devkit.environment import base_environment
from devkit.installer import run, venv_python

_WRITER = Path(__file__).with_name("checkpoint_writer.py")


def tiny_qwen2_vl() -> Path:
    """The checkpoint's directory. The same bytes everywhere: fixed seed, fixed order."""
    made_from = digest(_WRITER.read_bytes())

    def build(root: Path) -> None:
        run([venv_python(base_environment()), _WRITER, root])

    return build_once(cache_root() / "checkpoints" / f"tiny-qwen2-vl-{made_from}", made_from, build)
