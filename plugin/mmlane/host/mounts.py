"""What is mounted where, as /proc/PID/mountinfo tells."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mmlane.host.kernel_files import text


@dataclass(frozen=True)
class Mount:
    """A line of /proc/PID/mountinfo: what is mounted (`device` is MAJOR:MINOR, `root` a path inside of it), where.

    `options` are those of the file system. Every text may be empty.
    """

    device: str
    root: str
    point: str
    kind: str
    options: str


def mounts(file: Path = Path("/proc/self/mountinfo")) -> tuple[Mount, ...]:
    """What is mounted in sight of a process, in the file's order."""
    found = (_mount(line) for line in text(file).split("\n"))
    return tuple(mount for mount in found if mount is not None)


def _mount(line: str) -> Mount | None:
    """None for a line that is not of the kernel's form.

    A space stands between two fields, so one that is empty leaves two of them. Spaces inside are written \\040.
    """
    fields = line.split(" ")
    if "\\" in line:
        fields = [_unescaped(field) for field in fields]
    try:
        end = fields.index("-", 6)  # before it, there may be any number of optional fields
        kind, _, options = fields[end + 1 : end + 4]
    except ValueError:
        return None
    return Mount(fields[2], fields[3], fields[4], kind, options)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found[1], 8)), field)


def mount_of(path: Path) -> Mount | None:
    """What a path is on, mounted there or above; None where that is not told."""
    try:
        device = path.stat().st_dev
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount for mount in mounts() if mount.device == number), None)
