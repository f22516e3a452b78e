"""What becomes of a failure of ours that must not reach the engine: it is counted, and said once per cause."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress

logger = logging.getLogger("mmlane")

MOST = 100  # lines of all seams, should the causes never be the same twice

failures: Counter[str] = Counter()  # by seam, such as "put" or "metrics"; in /metrics as mmlane_failures_total
_said: set[tuple[str, str, str]] = set()


def failed(seam: str, error: BaseException, consequence: str) -> None:
    """Count a failure, and log one line for each cause: what failed, why, and what follows. Never raises.

    seam: where mmlane touches the engine, in a word; the same failure there is said once.
    """
    failures[seam] += 1
    with suppress(Exception):  # a broken __str__, or a log handler: it is counted all the same
        cause = (seam, type(error).__name__, str(error))
        if cause not in _said and len(_said) < MOST:
            _said.add(cause)
            logger.warning("mmlane: %s failed: %s: %s; %s", *cause, consequence)
