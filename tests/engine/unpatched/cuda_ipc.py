"""Features as CUDA IPC handles, on a stand-in for GPUs; see ipc_consumer.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.version import Version

from tests.engine import forks
from tests.engine.transcripts import HERE, scenario

SCRIPT = HERE / "ipc_consumer.py"

POOLED = Version("0.5.10")  # from here on a handle may be one of a whole pool, and is kept open
NATIVE = Version("0.5.11")  # from here on the engine itself opens on the reader's device, and shares out its pool
LEASED = Version("0.5.18")  # from here on ranks acknowledge on the GPU

PRIVATE = {"/dev/shm": f"size={64 << 20},mode=1777", "/tmp": "mode=1777"}

Results = dict[str, dict[str, Any]]
TAKING = ("unpooled", "same-device", "unreachable", "unseen", "failing", "by-value")
LOCKING = ("link", "exclusion", "others-file")
# What to run, by name: what is in the environment, and the scenarios.
PARTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "take": ({}, (*TAKING, *LOCKING)),
    "unset": ({}, ("pools", "overflow")),
    "64": ({"SGLANG_MM_FEATURE_CACHE_MB": "64"}, ("pools", "overflow")),
    "4096": ({"SGLANG_MM_FEATURE_CACHE_MB": "4096"}, ("pools",)),
    "squatted": ({"HOME": "/tmp/home"}, ("--squat", "link")),
}


def run(version: str, plugin: Path | None, *parts: str) -> dict[str, Results]:
    """What came of each scenario of each part; each part is a process of its own, and they run at once."""
    running = {}
    for name in parts:
        env, scenarios = PARTS[name]
        if name == "take" and Version(version) >= POOLED:
            scenarios = ("pooled", "stale", *scenarios)
        if name == "take" and Version(version) >= LEASED:
            scenarios = ("pooled", "stale")
        running[name] = forks.start(
            version,
            plugin,
            SCRIPT,
            *scenarios,
            env={"SGLANG_USE_CUDA_IPC_TRANSPORT": "1", **env},
            # By what chooses the lock's place; else it is read for caches of models and kernels.
            read_again=["HOME"],
            mounts=PRIVATE,
        )
    found: dict[str, Results] = {}
    for name, process in running.items():
        found[name], said = forks.answered(process, timeout_s=600)
        found[name]["mmlane"] = {"lines": [line for line in said.splitlines() if line.startswith("mmlane:")]}
    return found


@scenario(SCRIPT.name)
def cuda_ipc(version: str) -> Any:
    """What the engine's own modules do."""
    pools = ("unset", "64") if Version(version) < Version("0.5.14") else ()
    return run(version, None, "take", *pools)
