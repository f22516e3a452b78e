"""Facts of the machine, each looked up or tried on the spot.

None of them raises: what cannot be read, or is not of the kernel's form, counts as absent, and each function says
what it returns then. Linux only; standard library only.
"""

from __future__ import annotations

from mmlane.host.kernel import Feature, kernel_features
from mmlane.host.memory_limit import Memory, memory, memory_groups, room_problem
from mmlane.host.mounts import Mount, mount_of, mounts
from mmlane.host.proc import (
    PROC,
    Process,
    command_line,
    has_mapped,
    is_alive,
    lane_scope,
    max_map_count,
    overflow_uid,
    pid_namespace,
    pids,
    process,
    status_numbers,
)
from mmlane.host.segment_names import OUR_PREFIX, PREFIXES, SegmentName, new_segment_name, parse_segment_name
from mmlane.host.shm import SHM, Segment, SharedMemory, maker, room, shared_memory

__all__ = [
    "OUR_PREFIX",
    "PREFIXES",
    "PROC",
    "SHM",
    "Feature",
    "Memory",
    "Mount",
    "Process",
    "Segment",
    "SegmentName",
    "SharedMemory",
    "command_line",
    "has_mapped",
    "is_alive",
    "kernel_features",
    "lane_scope",
    "maker",
    "max_map_count",
    "memory",
    "memory_groups",
    "mount_of",
    "mounts",
    "new_segment_name",
    "overflow_uid",
    "parse_segment_name",
    "pid_namespace",
    "pids",
    "process",
    "room",
    "room_problem",
    "shared_memory",
    "status_numbers",
]
