"""How much a test does: in the usual run what finds most faults, in `make thorough` so much that it takes time."""

from __future__ import annotations

from hypothesis import settings


def examples(usual: int, thorough: int) -> int:
    """How many examples a test looks at (or seconds it goes on), by the profile of hypothesis that was chosen."""
    return thorough if settings.get_current_profile_name() == "thorough" else usual
