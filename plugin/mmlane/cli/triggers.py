"""Whether mmlane would start in an engine of this interpreter: its two triggers, as they are installed."""

from __future__ import annotations

import importlib.metadata
import site
import sys
from dataclasses import dataclass
from pathlib import Path

from mmlane import import_hook

GROUP = "sglang.srt.plugins"
NAME = "mmlane"


@dataclass(frozen=True)
class Triggers:
    """`start_file` holds the line by which every interpreter watches for the engine, `ran` that it did so here.

    `entry_point` is what the engine itself loads (from 0.5.11 on), as "module:function". `no_site`: this Python
    was started with -S, so that it runs no such line, and does not know where packages are installed.
    """

    start_file: Path | None
    ran: bool
    entry_point: str | None
    no_site: bool = False


def installed() -> Triggers:
    """The triggers in the interpreter that runs this."""
    point = next(iter(importlib.metadata.entry_points(group=GROUP, name=NAME)), None)
    return Triggers(
        start_file=next((file for file in _candidates() if file.is_file()), None),
        ran=import_hook.WATCH in sys.meta_path,
        entry_point=point.value if point is not None else None,
        no_site=bool(sys.flags.no_site),
    )


def _candidates() -> list[Path]:
    # From 3.15 on Python prefers NAME.start (PEP 829); older ones know only NAME.pth.
    names = ["mmlane.start", "mmlane.pth"] if sys.version_info >= (3, 15) else ["mmlane.pth"]
    directories = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        directories = [*directories, site.getusersitepackages()]
    return [Path(directory, name) for directory in directories for name in names]
