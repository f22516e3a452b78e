"""Stand-in for compiled operators that old engine releases fall back to; see mmlane_devkit_standins."""

from __future__ import annotations

from mmlane_devkit_standins import stand_in_for  # type: ignore[import-not-found,unused-ignore]

stand_in_for(__name__)
