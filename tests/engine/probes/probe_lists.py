"""Has features travel as lists of tensors, as some models' processors make them, or as embeddings.

In the tokenizer an item of a request whose text asks for it (EMBEDDED) gets made-up embeddings instead of its
feature; the feature of any other becomes a list of two. Ranks join the two when they have noted what came: the
tiny model takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from probe_auxiliary import items
from when_made import SCHEDULER, TOKENIZER, when_made

EMBEDDED = "As embeddings."
HIDDEN = 64  # of the devkit's checkpoints


def watch_tokenizer(manager: Any) -> None:
    manager._tokenize_one_request = tokenizing(manager._tokenize_one_request)


def tokenizing(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(tokenize)
    async def tokenize_one_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        request = await tokenize(self, obj, *args, **kwargs)
        for item in items(request):
            if EMBEDDED in (obj.text or ""):
                item.feature, item.precomputed_embeddings = None, made_up(item)
            else:
                item.feature = list(item.feature.chunk(2))
        return request

    return tokenize_one_request


def made_up(item: Any) -> Any:
    """Embeddings of an item's tokens, the same for the same item."""
    import torch

    tokens = sum(end - start + 1 for start, end in item.offsets)
    seed = int(item.feature.sum().item())
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def watch_scheduler(scheduler: Any) -> None:
    scheduler._get_multimodal_inputs = joining(scheduler._get_multimodal_inputs)


def joining(get: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(get)
    def get_multimodal_inputs(self: Any, mm_inputs: Any) -> Any:
        import torch

        there = mm_inputs["mm_items"] if isinstance(mm_inputs, dict) else getattr(mm_inputs, "mm_items", [])
        for item in there:
            if isinstance(item.feature, list):
                item.feature = torch.cat(item.feature)
        return get(self, mm_inputs)

    return get_multimodal_inputs


when_made(TOKENIZER, watch_tokenizer)
when_made(SCHEDULER, watch_scheduler)
