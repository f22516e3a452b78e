"""The platform itself: device "cpu", torch-native attention, gloo, the engine's own memory pools.

Not the engine's built-in CPU engine: that one wants kernels compiled for recent Intel CPUs. Every answer
below is a "no special support" that sends the engine to the code it would run on any unknown device.
One class serves all releases from 0.5.11; a hook that a release does not know is simply never called.
"""

# Runs inside the environments only; the base class differs from release to release.
# mypy: ignore-errors

from __future__ import annotations

import os

import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class CpuPlatform(SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    # Devices and memory

    def get_device(self, local_rank: int = 0):
        return torch.device("cpu")

    def set_device(self, device) -> None:
        """There is one."""

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_capability(self, device_id: int = 0):
        return None

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def get_available_memory(self, device_id: int = 0):
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def get_current_memory_usage(self, device=None) -> float:
        return 0.0

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    # How the engine runs a model here

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode=None) -> str:
        return "eager"

    def support_cuda_graph(self) -> bool:
        return False

    def support_piecewise_cuda_graph(self) -> bool:
        return False

    # Older releases have no "the engine's own" answer, so it is spelled out.

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind):
        return None

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator

    def get_graph_runner_cls(self):
        return None

    def get_piecewise_backend_cls(self):
        return None
