"""ipc_pool_budget: SGLANG_MM_FEATURE_CACHE_MB is what all pools of CUDA IPC features hold together, and 1 GiB.

Why: every tokenizer worker makes a pool of that size, 4 GiB by default, on the first GPU: memory that the model is
not given. And a pool that has no room says nothing, while features take a slower way.
Upstream: #22662.
How: `MmItemMemoryPool.__init__` is given a worker's share where the engine gives it the whole; the number of
workers is in the `server_args`, which each tokenizer publishes before it makes a pool. `get_available_chunk` says
once for each pool that it found no room.
When it can go: with the oldest supported engine at 0.5.11.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from mmlane.compat import matrix
from mmlane.log import guarded, logger
from mmlane.patching import Target

MODULE = "sglang.srt.utils.cuda_ipc_transport_utils"
VARIABLE = "SGLANG_MM_FEATURE_CACHE_MB"
MIB = 1 << 20
DEFAULT = 1024 * MIB
LEAST = 128 * MIB  # for one worker, as far as there is that much


def share(total: int, workers: int) -> int:
    """The bytes of one worker's pool."""
    return max(total // workers, min(LEAST, total))


def _pool(init: Callable[[Any, int, Any], None]) -> Callable[[Any, int, Any], None]:
    engine = sys.modules[MODULE]
    engines_size, server_args = engine.MM_FEATURE_CACHE_SIZE, engine.get_global_server_args

    @wraps(init)
    def __init__(self: Any, memory_size: int, recycle_interval: Any) -> None:
        with guarded("ipc_pool_budget", "the pool of CUDA IPC features is as large as the engine makes it"):
            if memory_size == engines_size:  # else the user set a size: leave it
                memory_size = _budget(memory_size, _workers(server_args))
        init(self, memory_size, recycle_interval)

    return __init__


def _budget(memory_size: int, workers: int) -> int:
    total = memory_size if VARIABLE in os.environ else DEFAULT
    mine = share(total, workers)
    logger.info(
        "the pool of CUDA IPC features takes %.0f MiB of GPU memory in each of %d tokenizer "
        "workers (%s: %.0f MiB for all, each with 128 at least)",
        *(mine / MIB, workers, VARIABLE, total / MIB),
    )
    return mine


def _workers(server_args: Callable[[], Any]) -> int:
    try:
        count: int = server_args().tokenizer_worker_num
    except ValueError:  # not published: a processor outside of any engine
        count = 1
    return count


def _say_full(pool: Any, src_tensor: Any) -> None:
    logger.warning(
        "a feature of %.2f MiB found no room in the pool of CUDA IPC features, which has %.2f "
        "MiB; so it goes by the CPU, through the lane or shared memory, which is slower; if features "
        "often do, raise %s; said once",
        src_tensor.numel() * src_tensor.element_size() / MIB,
        pool.memory_pool.numel() * pool.memory_pool.element_size() / MIB,
        VARIABLE,
    )


def _find_room(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @wraps(original)
    def get_available_chunk(self: Any, src_tensor: Any) -> Any:
        chunk = original(self, src_tensor)
        with guarded("ipc_pool_budget", "nothing is said when that pool is full"):
            if chunk is None and not getattr(self, "_mmlane_said_full", False):
                self._mmlane_said_full = True
                _say_full(self, src_tensor)
        return chunk

    return get_available_chunk


SPEC = matrix().spec(
    "ipc_pool_budget",
    targets=(
        Target(
            module=MODULE,
            name="MmItemMemoryPool.__init__",
            signature="(self, memory_size, recycle_interval)",
            replace=_pool,
            before="0.5.11",
        ),
        Target(
            module=MODULE,
            name="MmItemMemoryPool.get_available_chunk",
            signature="(self, src_tensor)",
            replace=_find_room,
            before="0.5.11",
        ),
    ),
    relies_on=(
        f"{MODULE}.MM_FEATURE_CACHE_SIZE",
        f"{MODULE}.MmItemMemoryPool.return_a_slice_tensor_with_flag",
        "sglang.srt.environ.Envs.SGLANG_MM_FEATURE_CACHE_MB",
        "sglang.srt.server_args.get_global_server_args",
    ),
)
