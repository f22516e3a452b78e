"""ipc_redirect: CUDA IPC handles are opened on the device of the rank that reads them.

Why: a rank opens a handle under a guard of the producer's device, and so makes a CUDA context there (about 500
MiB, once for each rank) that it never computes in.
Upstream: #22662.
How: `reconstruct_on_target_device` is shown a copy of the proxy's state in which the handle and the index beside
it name the reader's device; the driver maps the producer's memory there by peer access. Whether the handle is that
of a pool (`pool_handle`, from 0.5.10) or of the tensor alone, the engine goes by those two, in its cache's key as
well. Where a device that is visible here cannot reach another, the state stays, and one line says so.
When it can go: with the oldest supported engine at 0.5.11.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane.compat import matrix
from mmlane.log import guarded, logger
from mmlane.patching import Target

# A handle and the index of its device, for each way in which a tensor may have been shared.
SHARED = (("pool_handle", "pool_device_index"), ("handle", "device_index"))

_reach: dict[tuple[int, int], bool] = {}


def redirected(extra: dict[str, Any], device: int) -> dict[str, Any]:
    """A proxy's `ipc_extra` with `device` in place of the producer's; the same object where nothing changes."""
    for handle, index in SHARED:
        if handle in extra:
            producer = extra[index]
            if producer == device or not reaches(device, producer):
                return extra
            return {**extra, handle: (device, *extra[handle][1:]), index: device}
    return extra


def reaches(device: int, producer: int) -> bool:
    """Whether `device` can be given the producer's memory; asked, and answered in the log, once for each pair.

    A producer that is not visible here cannot be asked for, nor can the engine go there: that counts as yes.
    """
    pair = device, producer
    if pair not in _reach:
        import torch

        visible = max(pair) < torch.cuda.device_count()
        _reach[pair] = not visible or torch.cuda.can_device_access_peer(device, producer)
        if not _reach[pair]:
            logger.warning(
                "wanted peer access from cuda:%d to cuda:%d, found none; so features are opened on "
                "cuda:%d, as the engine does it, which costs this process a CUDA context there, about 500 MiB; "
                "silence this with MMLANE_DISABLE=ipc_redirect",
                device,
                producer,
                producer,
            )
    return _reach[pair]


def _reconstruct(original: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    @wraps(original)
    def reconstruct_on_target_device(self: Any, rebuild_device_idx: int) -> Any:
        state = self.proxy_state
        with guarded("ipc_redirect", "a handle is opened on the producer's GPU, as the engine does it"):
            if extra := state["ipc_extra"]:
                self.proxy_state = {**state, "ipc_extra": redirected(extra, rebuild_device_idx)}
        try:
            return original(self, rebuild_device_idx)
        finally:
            self.proxy_state = state

    return reconstruct_on_target_device


IPC = "sglang.srt.utils.cuda_ipc_transport_utils"
PROXY = f"{IPC}.CudaIpcTensorTransportProxy"

SPEC = matrix().spec(
    "ipc_redirect",
    targets=(
        Target(
            module=IPC,
            name="CudaIpcTensorTransportProxy.reconstruct_on_target_device",
            signature="(self, rebuild_device_idx)",
            replace=_reconstruct,
            before="0.5.11",
        ),
    ),
    relies_on=(
        f"{PROXY}.__init__",
        f"{PROXY}.get_proxy_state",
        f"{PROXY}._reconstruct_from_ipc_extra",
        f"{IPC}._normalize_pool_cache_key",
        f"{IPC}._pool_handle_cache_get_or_open",
    ),
)
