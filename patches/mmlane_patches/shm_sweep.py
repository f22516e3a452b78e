"""shm_sweep: what a crashed engine left in /dev/shm is reclaimed when an engine starts.

Why: an engine that is killed unlinks nothing. Its segments stay for as long as /dev/shm does, which in a pod with
a memory-backed emptyDir is longer than its containers; one crash left 18 GiB, and the next start found no room.
Upstream: #40723 (open). The engine's own `stale_shm_cleanup` runs in its CI only, and goes by pid alone.
How: `_set_envs_and_config` is the first thing that every launch calls, before it starts any process. What is proof
that a segment is dead is written in `leftovers`. `MMLANE_SWEEP=0` leaves everything.
When it can go: when the engine unlinks what a crash leaves, by a rule as careful.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from mmlane import host, settings
from mmlane.compat import matrix
from mmlane.log import guarded, print_line
from mmlane.patching import Target
from mmlane_patches import leftovers
from mmlane_patches.verdicts import Candidate


def before_launch(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Sweep before the engine starts its processes."""

    @wraps(original)
    def set_envs_and_config(server_args: Any) -> Any:
        sweep()
        return original(server_args)

    return set_envs_and_config


def sweep() -> None:
    """Reclaim what is provably dead, and say so. Never raises: whatever happens, the engine is to start."""
    with guarded("sweep", f"leftovers in {host.SHM} stay; MMLANE_SWEEP=0 silences this"):
        _sweep_and_report(settings.read(os.environ).sweep)


def _sweep_and_report(chosen: settings.Sweep) -> None:
    if chosen == "0":
        return
    reclaimed, left = leftovers.reclaim(private=chosen == "private")
    if reclaimed:
        print_line(
            f"reclaimed {_amount(reclaimed)} that a crashed engine left in {host.SHM}; MMLANE_SWEEP=0 leaves them"
        )
    for why, segments in left.items():
        print_line(f"left {_amount(segments)} in {host.SHM}, {segments[0].name} among them: {why}")


def _amount(segments: Sequence[Candidate]) -> str:
    held = sum(segment.bytes for segment in segments)
    return f"{len(segments)} segment{'s' * (len(segments) > 1)} ({held / 2**20:.1f} MiB)"


SPEC = matrix().spec(
    "shm_sweep",
    targets=(
        Target(
            module="sglang.srt.entrypoints.engine",
            name="_set_envs_and_config",
            signature="(server_args)",
            replace=before_launch,
        ),
    ),
    # What gives segments their names.
    relies_on=(
        "sglang.srt.utils.stale_shm_cleanup.make_shm_name",
        "sglang.srt.managers.mm_utils.ShmPointerMMData",
    ),
)
