"""What mmlane changes in the engine: one file per patch, named after its id in compat_matrix.yaml.

A patch file is read before the engine has set up its environment, so it imports neither torch nor the
engine. What needs them (`mmlane.transport`) is named by its targets, and imported when they are there.
Some patches rest on other files: `shm_sweep` on `leftovers` and `verdicts`, `ipc_lock` on `private_directory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from mmlane.compat import matrix
from mmlane.hookspecs import hookimpl
from mmlane.patching import PatchSpec

PATCHES: tuple[PatchSpec, ...] = tuple(import_module(f"{__name__}.{id}").SPEC for id in matrix().rows)


@hookimpl
def mmlane_patches() -> Sequence[PatchSpec]:
    """Our patches, in the order in which they are to be applied: that of the table's rows."""
    return PATCHES
