"""Takes what the engine's processor has made to be on a GPU, so that its move to the CPU is one from there.

The stand-ins are the questions alone, whether something is on a GPU: the processor, its threads, and the move are
the engine's own.
"""

from __future__ import annotations

from typing import Any

from when_made import TOKENIZER, when_made


def watch(manager: Any) -> None:
    from mmlane.transport import from_gpu, tokenizer_side

    from_gpu.has_context = lambda: True
    from_gpu.is_on_gpu = lambda tensor: True
    tokenizer_side.on_cuda = lambda server_args: True  # type: ignore[attr-defined]


when_made(TOKENIZER, watch)
