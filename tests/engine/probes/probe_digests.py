"""Notes a digest of every multimodal feature: in the tokenizer before it is sent, in each rank when it is handled.

One JSON object a line, one file a process, in the directory $NOTES; `tests/engine/digests.py` compares them. Only
ranks of the first pipeline stage take notes: the others are sent what they need, not what came.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from when_made import SCHEDULER, TOKENIZER, when_made

FIELDS = ("feature", "precomputed_embeddings")


def write(note: dict[str, Any]) -> None:
    with Path(os.environ["NOTES"], f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")


def described(request: Any) -> list[str]:
    """Each value in a request's items, in order: a digest of a tensor, or what else stands there."""
    return [f"{place} {_described(value)}" for place, value in _values(request)]


def _values(request: Any) -> Iterator[tuple[str, Any]]:
    inputs = _inputs(request)
    items = inputs.get("mm_items") if isinstance(inputs, dict) else getattr(inputs, "mm_items", None)
    for number, item in enumerate(items or ()):
        for field in FIELDS:
            value = getattr(item, field, None)
            if isinstance(value, list | tuple):
                yield from ((f"{number}.{field}.{index}", one) for index, one in enumerate(value))
            elif value is not None:
                yield f"{number}.{field}", value


def _inputs(request: Any) -> Any:
    """Older releases have another name for those of embedding requests."""
    return getattr(request, "mm_inputs", None) or getattr(request, "image_inputs", None)


def _described(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return f"<{type(value).__name__}>"
    if not value.is_cpu or value.layout is not torch.strided:
        return f"<{value.layout} tensor on {value.device}>"
    data = value.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()
    return f"{digest} {value.dtype} {tuple(value.shape)}"


# --- the tokenizer ---


def watch_tokenizer(manager: Any) -> None:
    manager._send_one_request = sending(manager._send_one_request)


def sending(send: Callable[..., Any]) -> Callable[..., Any]:
    """`_send_one_request`, which notes what it is given, and whether it was sent."""
    position = list(inspect.signature(send).parameters).index("tokenized_obj")  # on 0.5.9 it is not the first

    def noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        request = args[position] if len(args) > position else kwargs["tokenized_obj"]
        if values := described(request):
            write({"what": "sent", "rid": request.rid, "values": values})
        return str(request.rid)

    def failed(rid: str, error: BaseException) -> None:
        write({"what": "unsent", "rid": rid, "error": repr(error)})

    if inspect.iscoroutinefunction(send):  # from 0.5.20 on

        @wraps(send)
        async def send_async(*args: Any, **kwargs: Any) -> Any:
            rid = noted(args, kwargs)
            try:
                return await send(*args, **kwargs)
            except BaseException as error:
                failed(rid, error)
                raise

        return send_async

    @wraps(send)
    def send_one_request(*args: Any, **kwargs: Any) -> Any:
        rid = noted(args, kwargs)
        try:
            return send(*args, **kwargs)
        except BaseException as error:
            failed(rid, error)
            raise

    return send_one_request


# --- a scheduler ---


def watch_scheduler(scheduler: Any) -> None:
    for name in ("handle_generate_request", "handle_embedding_request"):
        setattr(scheduler, name, handling(getattr(scheduler, name)))


def handling(handle: Callable[..., Any]) -> Callable[..., Any]:
    """What a scheduler does with each single request that it has received, and the note of its features."""

    @wraps(handle)
    def handle_request(self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        ranks = _ranks(self)
        if not ranks.pp_rank:
            write(
                {
                    "what": "took",
                    "rid": recv_req.rid,
                    "replica": ranks.dp_rank or 0,
                    "rank": ranks.tp_rank,
                    "values": described(recv_req),
                    "inputs": type(getattr(recv_req, "mm_inputs", None)).__name__,
                }
            )
        return handle(self, recv_req, *args, **kwargs)

    return handle_request


def _ranks(scheduler: Any) -> Any:
    """What knows the scheduler's ranks on this release: itself, its `ps`, or from 0.5.21 on the context."""
    if hasattr(scheduler, "tp_rank"):
        return scheduler
    if hasattr(scheduler, "ps"):
        return scheduler.ps
    return sys.modules["sglang.srt.runtime_context"].get_parallel()


when_made(TOKENIZER, watch_tokenizer)
when_made(SCHEDULER, watch_scheduler)
