"""Has uvicorn wait for its workers as long as it takes.

Up to 0.5.11 the engine asks for 10 s in a way that today's uvicorn does not heed. It kills workers that do not
answer within 5 s, in which a slow machine has not imported the engine, for ever, with mmlane or without.
"""

from __future__ import annotations

from typing import Any

from uvicorn.supervisors.multiprocess import Process

LIMIT_S = 120.0
is_alive = Process.is_alive


def is_alive_after_all(self: Any, timeout: float = LIMIT_S) -> Any:
    return is_alive(self, timeout=LIMIT_S)


Process.is_alive = is_alive_after_all
