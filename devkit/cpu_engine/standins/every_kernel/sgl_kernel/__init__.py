"""Stand-in for the engine's compiled CUDA kernels; see mmlane_devkit_standins."""

from __future__ import annotations

from mmlane_devkit_standins import stand_in_for  # type: ignore[import-not-found,unused-ignore]

stand_in_for(__name__)
