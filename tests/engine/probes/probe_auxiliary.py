"""Gives every multimodal item tensors beside its feature, as models have that are too large to be served here.

In the tokenizer each item of a request gets auxiliary tensors and views of them (`DeepSeek-OCR` has such crops),
and the request embeddings that override its own. Ranks note what they get of it: one JSON object a line, in
$NOTES/PID.auxiliary. The overrides are taken away again there: the tiny model is not to compute with them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from probe_digests import _ranks as ranks
from when_made import SCHEDULER, TOKENIZER, when_made

BYTES = 2 << 20  # of an item's auxiliary tensors together


def made_up(seed: int) -> dict[str, Any]:
    import torch

    whole = torch.rand(4, BYTES // 16, generator=torch.Generator().manual_seed(seed))
    return {"crops": whole[0], "parts": [whole[1], [whole[2], whole[3]]], "count": [4, 2]}


def tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from tensors(part)
    elif not isinstance(value, int):
        yield value


def digest(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return f"<{type(value).__name__}>"
    return hashlib.blake2b(value.contiguous().numpy().data, digest_size=16).hexdigest()


def items(request: Any) -> list[Any]:
    inputs = request.mm_inputs
    if inputs is None:
        return []
    found: list[Any] = inputs["mm_items"] if isinstance(inputs, dict) else getattr(inputs, "mm_items", [])
    return found


def watch_tokenizer(manager: Any) -> None:
    manager._tokenize_one_request = tokenizing(manager._tokenize_one_request)


def tokenizing(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(tokenize)
    async def tokenize_one_request(*args: Any, **kwargs: Any) -> Any:
        request = await tokenize(*args, **kwargs)
        there = items(request)
        if there:
            seed = int.from_bytes(os.urandom(4), "big")
            data = made_up(seed)
            for item in there:  # the same tensors, as the engine has it for what it cannot split
                item.model_specific_data.update(data)
            if hasattr(request, "positional_embed_overrides"):
                from sglang.srt.managers.embed_types import PositionalEmbeds

                request.positional_embed_overrides = PositionalEmbeds(data["crops"][None], [0])
            wanted = [digest(value) for value in tensors(list(data.values()))]
            write("made", {"rid": request.rid, "digests": wanted, "items": len(there)})
        return request

    return tokenize_one_request


def watch_scheduler(scheduler: Any) -> None:
    scheduler.handle_generate_request = handling(scheduler.handle_generate_request)


def handling(handle: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handle)
    def handle_request(self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        there = items(recv_req)
        if there:
            overrides = getattr(recv_req, "positional_embed_overrides", None)
            note = {
                "rid": recv_req.rid,
                "stage": ranks(self).pp_rank,
                "digests": [
                    [
                        digest(value)
                        for value in tensors([item.model_specific_data[key] for key in ("crops", "parts")])
                    ]
                    for item in there
                ],
                "counts": [item.model_specific_data["count"] for item in there],
                "override": None if overrides is None else digest(overrides.embeds[0]),
            }
            write("auxiliary", note)
            if overrides is not None:
                recv_req.positional_embed_overrides = None
        return handle(self, recv_req, *args, **kwargs)

    return handle_request


def write(kind: str, note: dict[str, Any]) -> None:
    with Path(os.environ["NOTES"], f"{os.getpid()}.{kind}").open("a") as file:
        file.write(json.dumps(note) + "\n")


when_made(TOKENIZER, watch_tokenizer)
when_made(SCHEDULER, watch_scheduler)
