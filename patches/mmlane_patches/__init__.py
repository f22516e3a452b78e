"""What mmlane changes in the engine: one file per patch, named after its id in compat_matrix.yaml.

A patch file is read before the engine has set up its environment, so it imports neither torch nor the
engine. What needs them (`mmlane.transport`) is named by its targets, and imported when they are there.
Some patches rest on other files: `shm_sweep` on `leftovers` and `verdicts`, `ipc_lock` on `private_directory`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmlane.hookspecs import hookimpl
from mmlane.patching import PatchSpec
from mmlane_patches import (
    deferred_unwrap,
    fan_out,
    fan_out_images,
    inline_views,
    ipc_lock,
    ipc_pool_budget,
    ipc_redirect,
    lane,
    one_node,
    shm_pointer,
    shm_sweep,
    tp_barrier,
)


@hookimpl
def mmlane_patches() -> Sequence[PatchSpec]:
    """Our patches, in the order in which they are to be applied."""
    return [
        shm_pointer.SPEC,
        deferred_unwrap.SPEC,
        tp_barrier.SPEC,
        fan_out.SPEC,
        fan_out_images.SPEC,
        ipc_redirect.SPEC,
        ipc_pool_budget.SPEC,
        ipc_lock.SPEC,
        one_node.SPEC,
        inline_views.SPEC,
        lane.SPEC,
        shm_sweep.SPEC,
    ]
