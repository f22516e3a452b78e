"""Whether an engine has what a patch replaces, by its source: nothing of the engine is imported.

So every process of one engine comes to the same decision, and wheels can be checked that are not installed.
"""

from __future__ import annotations

from typing import Protocol

from mmlane.patching.spec import Refusal, Target


class Source(Protocol):
    """The source of an engine, as far as it is asked for here."""

    def signature(self, module: str, name: str) -> str:
        """As in `Target.signature`. Raises `LookupError`."""


def check(target: Target, source: Source) -> None:
    """Raise `Refusal` unless the source has the target, with a signature that the patch can live with."""
    try:
        found = source.signature(target.module, target.name)
    except LookupError as missing:
        raise Refusal(f"{target.wanted}, found {missing}") from None
    if found not in target.signatures:
        raise Refusal(f"{target.wanted}, found {found}")
