"""The pluggy hook by which patches reach mmlane: ours, and those of other packages.

A package adds patches by an entry point in the group `mmlane` that names a module (or object) with this in it:

    from mmlane.hookspecs import hookimpl

    @hookimpl
    def mmlane_patches():
        return [PatchSpec(...)]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmlane.patching import PatchSpec

PROJECT = "mmlane"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mmlane_patches() -> Sequence[PatchSpec]:
    """The patches that a package contributes, in the order in which they are to be applied."""
    raise NotImplementedError
