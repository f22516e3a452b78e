"""From which release on the engine itself is without a fault."""

from __future__ import annotations

from packaging.version import Version

DEFERRED = Version("0.5.10")  # ranks broadcast pointers instead of tensors, and have something to wait for
FANNED_OUT = Version("0.5.13")  # each of n samples has its own items
ISOLATED = Version("0.5.19")  # one lost segment fails one request
