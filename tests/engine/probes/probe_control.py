"""Adds the thread that controls a lane to what `probe_failures` raises in; an error there closes the lane."""

from __future__ import annotations

import probe_failures  # type: ignore[import-not-found]
from when_imported import when_imported

CONTROL = "mmlane.lane.control"

probe_failures.SEAMS[CONTROL] = ("Control._turn",)
when_imported(CONTROL, probe_failures.surround)
