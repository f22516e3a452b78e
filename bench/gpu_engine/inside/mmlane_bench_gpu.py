"""An out-of-tree platform that runs the engine's pure-torch paths on the first GPU."""

# Runs inside the engine only.
# mypy: ignore-errors

from __future__ import annotations

import torch

from devkit.cpu_engine.platform.platform import CpuPlatform


def activate() -> str:
    """The entry point: where the engine finds the platform's class."""
    return f"{__name__}:GpuPlatform"


class GpuPlatform(CpuPlatform):
    """As on any unknown device, but for the device, its memory, and that pinned memory is of use."""

    device_name = "cuda"
    device_type = "cuda"

    def get_device(self, local_rank: int = 0):
        return torch.device("cuda", 0)

    def set_device(self, device) -> None:
        torch.cuda.set_device(0)

    def get_device_name(self, device_id: int = 0) -> str:
        return torch.cuda.get_device_name(0)

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "0"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return torch.cuda.mem_get_info(0)[1]

    def get_available_memory(self, device_id: int = 0):
        return torch.cuda.mem_get_info(0)

    def get_current_memory_usage(self, device=None) -> float:
        free, total = torch.cuda.mem_get_info(0)
        return float(total - free)

    def is_pin_memory_available(self, device=None) -> bool:
        return True

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize()
