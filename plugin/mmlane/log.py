"""How mmlane logs, and what becomes of an error in mmlane itself, which must not reach the engine.

Such a failure is counted, and logged once per cause.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mmlane import PREFIX

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # takes no type before Python 3.11


class _Prefixed(_Adapter):
    """Begins every line with the same word, so that a person finds them among those of the engine."""

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return f"{PREFIX}{msg}", kwargs


logger = _Prefixed(logging.getLogger("mmlane"))

failures: Counter[str] = Counter()  # by place, such as "put" or "metrics"; in /metrics as mmlane_failures_total
_total: Callable[[str, int], None] | None = None  # told of each, once there are metrics
_said: set[tuple[str, str, int | None]] = set()


def failed(where: str, error: BaseException, consequence: str) -> None:
    """Count a failure, and log one line for each cause: what failed, why, and what follows. Never raises.

    where: the place at which mmlane touches the engine, in a word. A cause is a kind of error there, whatever its
    text says of this one request.
    """
    failures[where] += 1
    with suppress(Exception):  # a full disk; it is counted here all the same
        if _total is not None:
            _total(where, 1)
    with suppress(Exception):  # a broken __str__, or a log handler
        kind = type(error).__name__
        cause = (where, kind, getattr(error, "errno", None))
        if cause not in _said:
            _said.add(cause)
            # Its text: a handler that keeps records would keep the error's traceback, and with that a lane.
            logger.warning("%s failed: %s: %s; %s", where, kind, str(error), consequence)


def count_with(total: Callable[[str, int], None]) -> None:
    """Have every failure of this process counted elsewhere as well, those so far included."""
    global _total
    for where, count in list(failures.items()):
        total(where, count)
    _total = total


@contextmanager
def guarded(where: str, consequence: str) -> Iterator[None]:
    """What is done in here is ours alone: if it fails, `consequence` is what follows, and the engine goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not the engine's
        failed(where, error, consequence)


def print_line(line: str) -> None:
    """One line on standard error, for what comes before the engine has set up logging."""
    print(f"{PREFIX}{line}", file=sys.stderr, flush=True)
