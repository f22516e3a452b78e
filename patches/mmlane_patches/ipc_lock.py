"""ipc_lock: the file under whose lock ranks count in is where no other user can touch it.

Why: ranks lock /tmp/shm_wr_lock.lock, and open it so that it is emptied. Whoever may write to /tmp can have put a
link there, and the file that it leads to is emptied; or a file of theirs, and no rank can count in.
Upstream: none; 0.5.18 counts on the GPU, without a file.
How: the constant with that path is replaced by one in a directory of our own (`private_lock`), the same in all
processes of the engine.
When it can go: with the oldest supported engine at 0.5.18.
"""

from __future__ import annotations

from mmlane.compat import matrix
from mmlane.patching import Target

PROXY = "sglang.srt.utils.cuda_ipc_transport_utils.CudaIpcTensorTransportProxy"

SPEC = matrix().spec(
    "ipc_lock",
    targets=(
        Target(
            module="sglang.srt.utils.cuda_ipc_transport_utils",
            name="SHM_LOCK_FILE",
            signature="'/tmp/shm_wr_lock.lock'",
            replace="mmlane_patches.private_lock:in_its_place",
            before="0.5.18",
        ),
    ),
    # All that open the lock file.
    relies_on=(
        f"{PROXY}.reconstruct_on_target_device",
        f"{PROXY}._copy_slice_tensor_to_target",
        f"{PROXY}._acknowledge_consumption",
    ),
)
