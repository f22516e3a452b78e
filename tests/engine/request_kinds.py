"""The kinds of request, asked past a race of the engine's own.

From 0.5.11 to 0.5.18 the engine, with mmlane or without, sends the first of several prompts in one request while
it still tokenizes the next, and begins to wait for answers after that: an answer that is there before fails the
request with 500 (`KeyError` in `TokenizerManager._wait_one_response`). On a busy machine that happens to a request
on its own, too; it is asked again then, and only then.
"""

from __future__ import annotations

import re

from devkit.client import Reply
from tests.engine import asking
from tests.engine.watching import WatchedServer

BATCH = "batch of three"
LOST = re.compile(r"in _wait_one_response\n +state = self\.rid_to_state\[.*\]\n(?: +[~^]+\n)?KeyError")


def batch_of_three(server: WatchedServer) -> Reply:
    before = _lost(server)
    reply = asking.ANSWERED[BATCH](server)
    if reply.status != 500:
        return reply
    asking.wait_for(lambda: _lost(server) > before, f"the engine's own race, not another {reply}")
    return batch_of_three(server)


def _lost(server: WatchedServer) -> int:
    return len(LOST.findall(server.log()))


ANSWERED = {**asking.ANSWERED, BATCH: batch_of_three}
AT_ONCE = {name: ask for name, ask in ANSWERED.items() if name != BATCH}  # of a server that is busy with others
