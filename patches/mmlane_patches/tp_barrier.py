"""tp_barrier: no rank takes a feature, and unlinks its segment, before every rank has opened it.

Why: 0.5.9 has no barrier (it needed none, see `deferred_unwrap`); 0.5.10 - 0.5.14 have one on the TP group, and
none with DP-attention, where the groups that carried the request are others.
Upstream: #21655, #29543.
How: the function that receives runs without its own barrier; then the groups that carried the requests agree,
which is a barrier too and is left out when no request holds a pointer (`receiving`, `agreement`).
When it can go: with the oldest supported engine at 0.5.15.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target

SPEC = matrix().spec(
    "tp_barrier",
    targets=(
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.recv_requests",
            signature="(self)",
            replace="mmlane_patches.receiving:agree_after_deferring",
            before="0.5.10",
        ),
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.recv_requests",
            signature="(self)",
            replace="mmlane_patches.receiving:agree_after",
            since="0.5.10",
            before="0.5.13",
        ),
        Target(
            module="sglang.srt.managers.scheduler_components.request_receiver",
            name="SchedulerRequestReceiver._finalize_shm_features",
            signature="(self, recv_reqs)",
            replace="mmlane_patches.receiving:agree_before",
            since="0.5.13",
            before="0.5.15",
        ),
    ),
)
