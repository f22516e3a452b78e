"""One server on the GPU: the devkit's, but of this Python's own engine, and with its rank on the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.harness.machine import CHECKOUT
from devkit.environment import Environment
from devkit.server import EngineServer

PLATFORM = "mmlane_bench_gpu"
_INSIDE = Path(__file__).with_name("inside")
_ORDERLY_S = 20.0


class Server(EngineServer):
    """`python -m sglang.launch_server` in a session of its own, in a context; all of it has ended afterwards."""

    def __init__(self, model: Path, mode: str, scratch: Path) -> None:
        python, root = Path(sys.executable), Path(sys.prefix)
        super().__init__("0.5.16", environment=Environment("0.5.16", python, root, root), tp=1)
        self._model = model
        self._variables = environ(os.environ, mode, scratch)
        entry_point(scratch)

    def __exit__(self, *_: object) -> None:
        self.stop(_ORDERLY_S)

    def _command(self, port: int) -> list[str]:
        return [
            sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(self._model),
            "--host", "127.0.0.1", "--port", str(port), "--device", "cuda", "--tp", "1", "--dtype", "float32",
            "--attention-backend", "torch_native", "--disable-cuda-graph", "--disable-overlap-schedule",
            "--mem-fraction-static", "0.3", "--max-total-tokens", "131072", "--chunked-prefill-size", "65536",
            "--skip-server-warmup", "--disable-radix-cache", "--mm-feature-transport", "cpu",
        ]  # fmt: skip

    def _environ(self) -> dict[str, str]:
        return self._variables


def environ(ours: Mapping[str, str], mode: str, scratch: Path) -> dict[str, str]:
    """The server's environment: the caller's, but for what that says about Python, the engine or mmlane."""
    kept = {k: v for k, v in ours.items() if not k.startswith(("PYTHON", "SGLANG_", "MMLANE"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, (_INSIDE, scratch, CHECKOUT))),
        "SGLANG_PLATFORM": PLATFORM,
        "MMLANE": mode,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",  # compiling for one tiny model costs more than it gains
    }


def entry_point(directory: Path) -> None:
    """Let importlib.metadata find the platform, where `directory` is on Python's path."""
    info = directory / f"{PLATFORM}-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLATFORM}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.platforms]\n{PLATFORM} = {PLATFORM}:activate\n")
