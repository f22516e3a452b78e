"""How much memory there is: the machine's, and what the control groups of this process allow of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmlane.host.kernel_files import number, numbers, text
from mmlane.host.mounts import mounts


@dataclass(frozen=True)
class Memory:
    """The machine's memory, and the tightest cgroup limit on this process and its use, in bytes; None: no limit.

    `available` is what may still be taken, from the machine and from each of its control groups, before a process
    is killed for it; file caches that can be dropped count as available. What lies in /dev/shm or in a memfd is
    not such a cache.
    """

    total: int
    limit: int | None
    used: int | None
    available: int

    @property
    def bound(self) -> int:
        """What there is at most: the machine's, or the control group's."""
        return min(self.total, self.limit or self.total)

    def lane_capacity(self) -> int:
        """What a lane may hold unless the user says otherwise: a quarter, in whole MiB."""
        return -(-(self.bound // 4) >> 20) << 20


def memory(proc: Path = Path("/proc/self"), meminfo: Path = Path("/proc/meminfo")) -> Memory:
    """Memory of the machine and the cgroup limit that holds for this process, of version 1 or 2.

    Where the machine does not say what is available, all of its memory is; a limit that cannot be had is none, and
    a use that cannot be had is nothing.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: list[tuple[int, int | None]] = []
    available = min(numbers(meminfo).get("MemAvailable:", total // 1024) * 1024, total)
    for directory, limit_file, use_file in memory_groups(proc):
        limit = number(directory / limit_file)
        if limit is not None and limit < total:  # version 1 writes "no limit" as a very large number
            used = number(directory / use_file)
            found.append((limit, used))
            stat = numbers(directory / "memory.stat")
            prefix = "total_" if "total_inactive_file" in stat else ""
            cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            available = min(available, limit - (used or 0) + cache)
    limit, used = min(found, key=lambda pair: pair[0], default=(None, None))
    return Memory(total, limit, used, max(available, 0))


def memory_groups(proc: Path) -> Iterator[tuple[Path, str, str]]:
    """The directories of the cgroup with the memory controller, from this process's up to the topmost in sight."""
    lines = [line.split(":", 2) for line in text(proc / "cgroup").split("\n")]
    groups = [line for line in lines if len(line) == 3]
    for mount in mounts(proc / "mountinfo"):
        if mount.kind == "cgroup2":
            names = ("memory.max", "memory.current")
            mine = [path for hierarchy, _, path in groups if hierarchy == "0"]
        elif mount.kind == "cgroup" and "memory" in mount.options.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            mine = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
        else:
            continue
        top = Path(mount.point)
        for path in mine:
            directory = top / _inside(path, mount.root)
            for group in (directory, *directory.parents):
                yield group, *names
                if group == top:
                    break


def _inside(path: str, root: str) -> PurePosixPath:
    """A group's path from what is mounted on; that itself where the group is not in there."""
    here = PurePosixPath()
    try:
        inside = PurePosixPath(path).relative_to(root)
    except ValueError:
        return here
    return here if ".." in inside.parts else inside


def room_problem(nbytes: int) -> str:
    """Why a file in memory of that size cannot be made and mapped here; "" when it can. Commits none of it.

    Also "" where there is no `memfd_create` to try it with, which `kernel_features` tells.
    """
    try:
        fd = os.memfd_create("mmlane-doctor", os.MFD_CLOEXEC)
    except (OSError, AttributeError):
        return ""
    try:
        os.ftruncate(fd, nbytes)
        mmap.mmap(fd, nbytes).close()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # no bytes at all
        return str(error)
    except OverflowError:
        return "more bytes than this system can count"
    finally:
        os.close(fd)
    return ""
