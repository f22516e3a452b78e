"""Takes what the engine's processor has made to be on a GPU, so that its move to the CPU is one from there.

The stand-in is the question alone (`is_on_gpu`): the processor, its threads, and the move are the engine's own.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from when_made import TOKENIZER, when_made


def watch(manager: Any) -> None:
    from mmlane.transport import from_gpu, tokenizer_side

    from_gpu.has_context = lambda: True
    from_gpu.is_on_gpu = lambda tensor: True
    start = tokenizer_side.start

    @wraps(start)
    def starting(manager: Any, *args: Any, **kwargs: Any) -> None:
        start(manager, *args, **kwargs)
        side = getattr(manager, tokenizer_side.SIDE)
        from_gpu.into_lane(manager.mm_processor, side.producer)

    tokenizer_side.start = starting


when_made(TOKENIZER, watch)
