"""Python imports this in every process of an engine under test; it runs the probes that $PROBES names.

A probe is a module of this directory, without its `probe_`: digests, held, ...

Python's collector begins when the engine has been imported: looking for garbage takes a fifth of the time of the
import, and there is none.
"""

from __future__ import annotations

import gc
import importlib
import os
from types import ModuleType

from when_imported import when_imported


def begin_to_collect(last: ModuleType) -> None:
    gc.freeze()
    gc.enable()


gc.disable()
for name in ("detokenizer_manager", "scheduler"):  # the last of what a process of the engine imports
    when_imported(f"sglang.srt.managers.{name}", begin_to_collect)
for name in os.environ.get("PROBES", "").split():
    importlib.import_module(f"probe_{name}")
