"""deferred_unwrap: broadcast pointers, not tensors.

Why: 0.5.9 turns pointers into tensors on the first rank and then pickles whole tensors to every other one.
Upstream: #21465.
How: `unwrap_shm_features` does nothing while `Scheduler.recv_requests` runs; `tp_barrier`, which wraps that,
takes the features when the ranks have agreed on them. The two are in one group for that reason.
When it can go: with the oldest supported engine at 0.5.10.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target
from mmlane_patches.tp_barrier import RECEIVING

SPEC = matrix().spec(
    "deferred_unwrap",
    targets=(
        Target(
            module="sglang.srt.managers.mm_utils",
            name="unwrap_shm_features",
            signature="(obj)",
            replace="mmlane.transport.scheduler_side:unwrap_nothing_while_receiving",
            before="0.5.10",
        ),
    ),
    relies_on=RECEIVING,
)
