"""The GPUs: whether there are any, what they are, and the few calls that are made to them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import facts

_NODES = Path("/sys/devices/system/node/online")
_ASKED = ("driver_version", "pcie.link.gen.max", "pcie.link.width.max")


def lacking(
    wanted: Sequence[int] | None,
    *,
    torch_version: str = torch.__version__,
    cuda: str | None = torch.version.cuda,
    found: int | None = None,
) -> str | None:
    """One line on what is wanted, what was found, and how to get it; None where nothing lacks.

    `wanted`: indices of devices, None for one at least. The others are facts of this process unless given.
    """
    what = f"devices {', '.join(map(str, wanted))}" if wanted else "one at least"
    if cuda is None:
        return (
            f"no CUDA device: torch {torch_version} was built without CUDA; wanted: {what}; install torch for CUDA"
            " (https://pytorch.org/get-started/locally) on a machine with an NVIDIA GPU"
        )
    count = torch.cuda.device_count() if found is None else found
    if count > max(wanted or [0]):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return (
        f"{'too few CUDA devices' if count else 'no CUDA device'}: wanted: {what}; found: {count} by torch"
        f" {torch_version} for CUDA {cuda}, CUDA_VISIBLE_DEVICES={visible};"
        " see that `nvidia-smi -L` lists them here, and in a container that it was started with --gpus"
    )


@dataclass(frozen=True)
class Device:
    """A GPU by torch's index; in a rehearsal the CPU instead."""

    index: int
    rehearse: bool = False

    @property
    def name(self) -> str:
        return f"cuda:{self.index}"

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else self.name)

    def enter(self) -> None:
        """Make this the process's device, with a context on it."""
        if not self.rehearse:
            torch.cuda.set_device(self.index)
            torch.zeros(1, device=self.torch)
            self.synchronize()

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy on this device, which may be under way still."""
        return tensor.to(self.torch, non_blocking=True, copy=True)

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize(self.index)

    def reaches(self, other: int) -> bool:
        """Whether this GPU can read the other one's memory."""
        return self.rehearse or self.index == other or torch.cuda.can_device_access_peer(self.index, other)

    def used(self) -> int:
        """Bytes in use on this GPU, by whomever. Makes a context on it."""
        if self.rehearse:
            return 0
        free, total = torch.cuda.mem_get_info(self.index)
        return int(total - free)

    def reserved(self) -> int:
        """Bytes that this process's allocator has on this GPU."""
        return 0 if self.rehearse else torch.cuda.memory_reserved(self.index)


class Watcher:
    """Looks at the GPUs from a process of its own that has its contexts already."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        for device in devices:
            device.enter()

    def used(self) -> dict[int, int]:
        """Bytes in use on each GPU."""
        return {device.index: device.used() for device in self._devices}

    def facts(self) -> dict[str, Any]:
        """The GPUs and the machine, as far as easily had."""
        return {
            **facts(),
            "gpus": [{"name": "none, rehearsal"} if d.rehearse else _facts(d.index) for d in self._devices],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "numa_nodes": _NODES.read_text().strip() if _NODES.exists() else "unknown",
        }

    def close(self) -> None: ...


def _facts(index: int) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(index)
    found = {"index": index, "name": properties.name, "memory_bytes": properties.total_memory}
    try:
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:  # an older torch
        return found
    numa = Path(f"/sys/bus/pci/devices/{bus}/numa_node")
    return found | {"bus": bus, "numa_node": numa.read_text().strip() if numa.exists() else "unknown"} | _smi(bus)


def _smi(bus: str) -> dict[str, str]:
    """The most that the link can do: an idle one may be clocked down."""
    command = ["nvidia-smi", f"--id={bus}", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED, done.stdout.strip().split(", "), strict=False))
