"""What the unit tests share."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what imports made: many tests call it for their own objects."""
    gc.collect()
    gc.freeze()
