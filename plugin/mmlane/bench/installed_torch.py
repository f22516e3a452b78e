"""Which torch this Python has, and whether it has CUDA: a process of its own is asked, and may fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass

_PATIENCE_S = 300.0
_ASK = """
import json, torch
cuda = torch.version.hip is None and torch.cuda.is_available()
print(json.dumps([torch.__version__, torch.cuda.get_device_name(0) if cuda else None]))
"""


@dataclass(frozen=True)
class Torch:
    """gpu: the name of the first CUDA device, None without one; torch for ROCm counts as without."""

    version: str
    gpu: str | None

    @property
    def device(self) -> str | None:
        """As torch calls it."""
        return None if self.gpu is None else "cuda:0"


class NoTorch(RuntimeError):
    """It cannot be imported; in one line, why."""


def installed() -> Torch:
    """Raises NoTorch."""
    if importlib.util.find_spec("torch") is None:
        raise NoTorch("no torch: this Python cannot import it, and without it there are no tensors to send")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoTorch(f"torch could not be imported in {_PATIENCE_S:g} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").rpartition("\n")[2]
        raise NoTorch(f"torch cannot be imported: {last}")
    version, gpu = json.loads(done.stdout.splitlines()[-1])
    return Torch(version, gpu)
