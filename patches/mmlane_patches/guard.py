"""What becomes of a failure of ours that must not reach the engine: it is counted, and said once per cause."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

logger = logging.getLogger("mmlane")

failures: Counter[str] = Counter()  # by seam, such as "put" or "metrics"; in /metrics as mmlane_failures_total
_said: set[tuple[str, str, int | None]] = set()


def failed(seam: str, error: BaseException, consequence: str) -> None:
    """Count a failure, and log one line for each cause: what failed, why, and what follows. Never raises.

    seam: where mmlane touches the engine, in a word. A cause is a kind of error there, whatever its text says of
    this one request.
    """
    failures[seam] += 1
    with suppress(Exception):  # a broken __str__, or a log handler: it is counted all the same
        kind = type(error).__name__
        cause = (seam, kind, getattr(error, "errno", None))
        if cause not in _said:
            _said.add(cause)
            logger.warning("mmlane: %s failed: %s: %s; %s", seam, kind, error, consequence)


@contextmanager
def guarded(seam: str, consequence: str) -> Iterator[None]:
    """What is done in here is ours alone: if it fails, `consequence` is what follows, and the engine goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not the engine's
        failed(seam, error, consequence)
