"""The kinds of request that a busy server can be asked at once.

Not several prompts in one request. From 0.5.11 to 0.5.18 the engine, with mmlane or without, sends the first of
them while it still tokenizes the next, and begins to wait for answers after that: an answer that is there before
fails the request with 500 (`KeyError` in `TokenizerManager._wait_one_response`).
"""

from __future__ import annotations

from tests.engine import asking

AT_ONCE = {name: ask for name, ask in asking.ANSWERED.items() if name != "batch of three"}
assert len(AT_ONCE) == len(asking.ANSWERED) - 1
