"""While there is a file $NOTES/hold, sends a request only when every ticket of its lane has been released.

So the n samples of a prompt find nothing of the request that warmed its prefix, as on a machine that is slow.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from when_made import before_each_send

LIMIT_S = 60.0  # only a fault takes that long


def hold(manager: Any) -> None:
    """Ranks do not need this process to release tickets: asking for the lane's numbers handles what they sent."""
    if not Path(os.environ["NOTES"], "hold").exists():
        return
    from mmlane.transport.tokenizer_side import SIDE

    lane = getattr(manager, SIDE).producer.lane
    deadline = time.monotonic() + LIMIT_S
    while lane is not None and (tickets := lane.stats().tickets):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{tickets} tickets have not been released")
        time.sleep(0.002)


before_each_send(hold)
