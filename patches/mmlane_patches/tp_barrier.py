"""tp_barrier: no rank takes a feature, and unlinks its segment, before every rank has opened it.

Why: 0.5.9 has no barrier (it needed none, see `deferred_unwrap`); 0.5.10 - 0.5.14 have one on the TP group, and
none with DP-attention, where the groups that carried the request are others.
Upstream: #21655, #29543.
How: the function that receives runs without its own barrier; then the groups that carried the requests agree,
which is a barrier too and is left out when no request holds a pointer (`mmlane.transport.scheduler_side`). Up to
0.5.12 its barrier and its taking go by two functions of `mm_utils`, which do nothing while it runs.
When it can go: with the oldest supported engine at 0.5.15.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target

MM_UTILS = "sglang.srt.managers.mm_utils"
RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"

# How requests are received, on any release: also other patches rely on it.
RECEIVING = (
    "sglang.srt.managers.scheduler.Scheduler.recv_requests",
    f"{RECEIVER}.recv_requests",
    f"{RECEIVER}._broadcast_reqs_across_ranks",
    f"{RECEIVER}.unwrap_pickle_wrapper",
    f"{RECEIVER}._finalize_shm_features",
    f"{MM_UTILS}.unwrap_shm_features",
    f"{MM_UTILS}.has_shm_features",
)

SPEC = matrix().spec(
    "tp_barrier",
    targets=(
        Target(
            module="sglang.srt.managers.scheduler",
            name="Scheduler.recv_requests",
            signature="(self)",
            replace="mmlane.transport.scheduler_side:take_after",
            before="0.5.13",
        ),
        Target(
            module=MM_UTILS,
            name="unwrap_shm_features",
            signature="(obj)",
            replace="mmlane.transport.scheduler_side:unwrap_nothing_while_receiving",
            since="0.5.10",
            before="0.5.13",
        ),
        Target(
            module=MM_UTILS,
            name="has_shm_features",
            signature="(recv_reqs)",
            replace="mmlane.transport.scheduler_side:has_nothing_while_receiving",
            since="0.5.10",
            before="0.5.13",
        ),
        Target(
            module="sglang.srt.managers.scheduler_components.request_receiver",
            name="SchedulerRequestReceiver._finalize_shm_features",
            signature="(self, recv_reqs)",
            replace="mmlane.transport.scheduler_side:take_before",
            since="0.5.13",
            before="0.5.15",
        ),
    ),
    relies_on=RECEIVING,
)
