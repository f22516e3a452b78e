"""The kinds of request that a busy server can be asked at once.

Not several prompts in one request. From 0.5.11 to 0.5.18 the engine, with mmlane or without, sends the first of
them while it still tokenizes the next, and begins to wait for answers after that: an answer that is there before
fails the request with 500 (`KeyError` in `TokenizerManager._wait_one_response`).
"""

from __future__ import annotations

from tests.engine import asking

AT_ONCE = dict(asking.ANSWERED)
del AT_ONCE["batch of three"]
