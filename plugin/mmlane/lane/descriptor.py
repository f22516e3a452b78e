"""A file descriptor that belongs to an object."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class Descriptor:
    """A file descriptor, closed when the object dies: code that may still use the number holds the object.

    What is open at the end of the interpreter, the kernel closes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(
        self, ending: Callable[[], bool] = sys.is_finalizing, close: Callable[[int], None] = os.close
    ) -> None:
        if not ending() and hasattr(self, "fd"):
            close(self.fd)
