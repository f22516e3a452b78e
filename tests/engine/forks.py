"""Scripts that import the engine, each in a process forked from one per release and mode (devkit/fork_server.py).

That one has imported nearly all that the engine's schedulers and tokenizers import. What is left reads variables
that some scripts set: each script imports it itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devkit.environment import engine_environment
from devkit.fork_server import ForkServer, Running

# What every process gets that imports the engine. BLAS and OpenMP start no threads: they do not survive a fork.
ENV = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C.UTF-8",  # without a locale, Python sets one
    "HF_HUB_OFFLINE": "1",
    "HOME": str(Path.home()),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
IMPORTED = ("sglang.srt.layers.quantization", "sglang.srt.constrained.base_grammar_backend")

_servers: dict[tuple[str, Path | None], ForkServer] = {}


def start(
    version: str,
    plugin: Path | None,
    *words: str | Path,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Running:
    """Run a script (the first of the words) with a release, with the plugin or without.

    `options` are those of `ForkServer.start`. The servers of other releases end.
    """
    for other in [key for key in _servers if key[0] != version]:
        _servers.pop(other).close()
    if (version, plugin) not in _servers:
        python = engine_environment(version, plugin=plugin).python
        _servers[version, plugin] = ForkServer(python, IMPORTED, ENV)
    return _servers[version, plugin].start(words, env={**ENV, **(env or {})}, **options)


def answered(running: Running, timeout_s: float = 300) -> tuple[Any, str]:
    """What a script printed as JSON in its last line, and all that it said on standard error."""
    done = running.result(timeout_s)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
