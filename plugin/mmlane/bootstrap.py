"""What the .pth line runs in every interpreter: watch for the engine, cost nothing otherwise.

Standard library only, and of that only what the interpreter has loaded already. What raises here is kept by
the .pth line until the engine is imported: other Python processes of the user's machine are not to hear of it.
"""

import os
import sys

from mmlane.import_hook import WATCH, give_up, is_unstarted_child

ENGINE = "sglang"


def install() -> None:
    """Arrange for mmlane to start when this process first imports the engine. Idempotent.

    Does nothing when `MMLANE=off`, unless the command line carries a `--mmlane` flag, or a `--config` file
    that may, which must be taken off before the engine parses it.
    """
    if os.environ.get("MMLANE", "").strip().lower() == "off" and not _flagged():
        return
    if WATCH not in sys.meta_path and ENGINE not in sys.modules:
        WATCH.before[ENGINE] = _start
        sys.meta_path.insert(0, WATCH)


def _flagged() -> bool:
    return any(word.startswith(("--mmlane", "--config")) for word in getattr(sys, "argv", ()))


def _start() -> None:
    try:
        from mmlane import entry
    except Exception as error:  # noqa: BLE001 - a part of it, or a dependency, is gone or half written
        give_up(error, child=is_unstarted_child())
        return
    entry.start("startup hook")
