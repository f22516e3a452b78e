"""shm_sweep: what a crashed engine left in /dev/shm is reclaimed when an engine starts.

Why: an engine that is killed unlinks nothing. Its segments stay for as long as /dev/shm does, which in a pod with
a memory-backed emptyDir is longer than its containers; one crash left 18 GiB, and the next start found no room.
Upstream: #40723 (open). The engine's own `stale_shm_cleanup` runs in its CI only, and goes by pid alone.
How: `_set_envs_and_config` is the first thing that every launch calls, before it starts any process. What is proof
that a segment is dead is written in `sweeping`. `MMLANE_SWEEP=0` leaves everything.
When it can go: when the engine unlinks what a crash leaves, by a rule as careful.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target

SPEC = matrix().spec(
    "shm_sweep",
    targets=(
        Target(
            module="sglang.srt.entrypoints.engine",
            name="_set_envs_and_config",
            signature="(server_args)",
            replace="mmlane_patches.sweeping:before_launch",
        ),
    ),
    # What gives segments their names.
    relies_on=(
        "sglang.srt.utils.stale_shm_cleanup.make_shm_name",
        "sglang.srt.managers.mm_utils.ShmPointerMMData",
    ),
)
