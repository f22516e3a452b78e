"""Patches: what they change in an engine, whether it fits, and how one is applied and undone.

A patch is a `PatchSpec` with one or more `Target`s (`spec`). Each is compared with the engine's source
(`checking`); for each patch there is a `Decision`; and a `Patcher` replaces the targets in the engine's modules as
they are imported, reads them back, and undoes that (`replacement`), unless another plugin was first (`origin`).
Nothing here knows a release.
"""

from __future__ import annotations

from mmlane.patching.checking import Source, check
from mmlane.patching.decision import Decision, propagate_skips
from mmlane.patching.origin import replaced_by
from mmlane.patching.patcher import Patcher
from mmlane.patching.replacement import Replacement, apply
from mmlane.patching.spec import Cell, Failure, PatchSpec, Refusal, State, Target, shared_steps

__all__ = [
    "Cell",
    "Decision",
    "Failure",
    "PatchSpec",
    "Patcher",
    "Refusal",
    "Replacement",
    "Source",
    "State",
    "Target",
    "apply",
    "check",
    "propagate_skips",
    "replaced_by",
    "shared_steps",
]
