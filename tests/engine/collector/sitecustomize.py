"""Has Python collect cycles on SIGUSR2; first on the PYTHONPATH of an engine under test."""

from __future__ import annotations

import gc
import signal

signal.signal(signal.SIGUSR2, lambda *_: gc.collect())
