"""The names of shared-memory segments: whose one is, and which process has made it. One form for each kind:

    mmlane_PID_STARTTIME_PIDNAMESPACE_RANDOM    ours
    sgl_shm_KIND_PID_RANDOM                     the engine's
    psm_RANDOM                                  Python's, for a segment without a name

The engine's pointers below 0.5.15 are of the third kind, as are those of any other Python program. STARTTIME is
field 22 of /proc/PID/stat (clock ticks since boot), PIDNAMESPACE the inode of /proc/PID/ns/pid; both are 0 where
/proc does not tell.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mmlane.host import proc

Kind = Literal["mmlane", "engine", "python"]

OUR_PREFIX = "mmlane_"
PREFIXES: tuple[tuple[str, Kind], ...] = ((OUR_PREFIX, "mmlane"), ("sgl_shm_", "engine"), ("psm_", "python"))

_FORMS: dict[Kind, re.Pattern[str]] = {
    "mmlane": re.compile(r"mmlane_(?P<pid>[1-9][0-9]*)_(?P<started>[0-9]+)_(?P<namespace>[0-9]+)_[0-9a-f]{16}"),
    "engine": re.compile(r"sgl_shm_[a-z]+_(?P<pid>[1-9][0-9]*)_[0-9a-f]{8}"),
    "python": re.compile(r"psm_[0-9a-f]{8}"),
}


@dataclass(frozen=True)
class SegmentName:
    """What a name tells: whose segment it is, and of the process that has made it what follows.

    pid: its number; None where the name does not tell. started: in clock ticks since boot, namespace: the one that
    its pid is of; 0 where the name does not tell.
    """

    kind: Kind
    pid: int | None = None
    started: int = 0
    namespace: int = 0


def kind_of(name: str) -> Kind | None:
    """Whose segment it is, by what the name starts with."""
    return next((kind for prefix, kind in PREFIXES if name.startswith(prefix)), None)


def parse_segment_name(name: str) -> SegmentName | None:
    """What a name tells; None for one that is of no kind's form."""
    for kind, form in _FORMS.items():
        if (found := form.fullmatch(name)) is not None:
            return SegmentName(kind, **{field: int(number) for field, number in found.groupdict().items()})
    return None


def new_segment_name() -> str:
    """A fresh name for a segment of this process, which tells for certain whose it is."""
    pid = os.getpid()
    return f"{OUR_PREFIX}{pid}_{_identity(pid)}_{secrets.token_hex(8)}"


@lru_cache(maxsize=1)
def _identity(pid: int) -> str:
    process, namespace = proc.process(pid), proc.pid_namespace()
    return "0_0" if process is None or namespace is None else f"{process.started}_{namespace}"
