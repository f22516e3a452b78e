"""While there is a file $NOTES/hold, sends a request only when every ticket of the tokenizer's lane has come back.

So the n samples of a prompt find nothing of the request that warmed its prefix, as on a machine that is slow.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from when_made import TOKENIZER, when_made

LIMIT_S = 60.0  # only a fault takes that long


def watch_tokenizer(manager: Any) -> None:
    manager._send_one_request = held(manager._send_one_request)


def held(send: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(send):  # from 0.5.20 on

        @wraps(send)
        async def send_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            hold(self)
            return await send(self, *args, **kwargs)

        return send_async

    @wraps(send)
    def send_one_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        hold(self)
        return send(self, *args, **kwargs)

    return send_one_request


def hold(manager: Any) -> None:
    """Tickets come back to a thread of the lane, and the ranks do not need this process to let go of them."""
    if not Path(os.environ["NOTES"], "hold").exists():
        return
    from mmlane_patches import lanes

    lane = lanes.producers[manager].lane
    deadline = time.monotonic() + LIMIT_S
    while lane is not None and (tickets := lane.stats().tickets):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{tickets} tickets have not come back")
        time.sleep(0.002)


when_made(TOKENIZER, watch_tokenizer)
