"""What every benchmark says of the machine and the moment that it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """What is checked out here, or "unknown" in a copy without git."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def facts() -> dict[str, Any]:
    """Cores, processor, memory in bytes, kernel, commit of this checkout, and the time."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "commit": commit(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def in_short() -> str:
    """Processor and commit, in a line."""
    known = facts()
    return f"{known['cores']} cores ({known['processor']}), mmlane {known['commit']}"


def _processor() -> str:
    """The model that /proc/cpuinfo names, or else the architecture."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()
