"""Raises in functions of mmlane: in those that the file $NOTES/fail names while it is there.

Its lines are `MODULE:NAME ERROR [TITLE]`: ERROR is the name of an error in mmlane.lane, or of a new one that
no code expects; with a TITLE, only processes of that title fail. The functions are those of SEAMS. A process
writes each failure as a line to $NOTES/PID.failed before it raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from when_imported import when_imported

# Of each place at which the engine calls mmlane, a function of ours that is called there.
SEAMS = {
    "mmlane.engine.requests": ("Place.replace", "own_items"),
    "mmlane.lane.producer": ("Lane.put", "Lane.copy"),
    "mmlane.lane.reader": ("Reader.join", "Reader.take"),
    "mmlane.transport.lane": ("Ticket.__init__",),
    "mmlane.transport.metrics": ("_write",),
    "mmlane.transport.samples": ("Samples.put", "Samples.close"),
    "mmlane.transport.scheduler_side": ("start",),
    "mmlane.transport.segment_memory": ("store",),
    "mmlane.transport.tokenizer_side": ("start",),
    "mmlane_patches.fan_out_images": ("_keep_together",),
    "mmlane_patches.leftovers": ("reclaim",),
}


def surround(module: ModuleType) -> None:
    for seam in SEAMS[module.__name__]:
        owner: Any = module
        *outer, attribute = seam.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, attribute, failing(f"{module.__name__}:{seam}", getattr(owner, attribute)))


def failing(seam: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for line in wanted():
            name, error, title = f"{line} ".split(" ", 2)
            if name == seam and title.strip() in Path("/proc/self/cmdline").read_text():
                with Path(os.environ["NOTES"], f"{os.getpid()}.failed").open("a") as failed:
                    failed.write(f"{seam}\n")
                raise kind(error)(f"in {seam}")
        return function(*args, **kwargs)

    return call


def wanted() -> list[str]:
    try:
        return Path(os.environ["NOTES"], "fail").read_text().splitlines()
    except FileNotFoundError:
        return []


def kind(name: str) -> Any:
    from mmlane import lane

    return getattr(lane, name) if name in lane.__all__ else type(name, (Exception,), {})


for name in SEAMS:
    when_imported(name, surround)
