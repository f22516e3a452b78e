"""What was processed on a GPU is copied from there straight into the lane, by the one copy that the engine makes.

The engine has images processed on the first GPU, moves the result to the CPU (`tensor.to("cpu")`), cuts it into
views, hashes them, and sends them. Here the move goes into a reservation of the lane, in pinned memory where that
is registered; the views lie in it, so that nothing is left to be copied when they are sent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mmlane.lane.mapping import lies_as_it_is
from mmlane.lane.ticket import NAMES
from mmlane.log import guarded
from mmlane.transport.inline import SMALL
from mmlane.transport.lane import Producer

# Methods of the engine's processors that move what they have made to the CPU, in whichever thread.
_PROCESS = "process_and_combine_mm_data"  # one request's media
_PREPARE = "prepare_artifact_batch"  # of several requests, by some processors, for a cache or without one


def into_lane(processor: Any, producer: Producer) -> None:
    """Have what this processor moves from a GPU to the CPU put into the lane of the process that it is in."""
    # What a cache keeps would take the lane's room.
    is_cached = getattr(getattr(processor, "mm_preprocess_cache", None), "enabled", False)
    for name in (_PROCESS,) if is_cached else (_PROCESS, _PREPARE):
        if (process := getattr(type(processor), name, None)) is not None:
            setattr(processor, name, _around(process, weakref.ref(processor), producer))


def _around(process: Callable[..., Any], itself: weakref.ref[Any], producer: Producer) -> Callable[..., Any]:
    """A method, for one object. It does not keep that: the lane is closed when its tokenizer is let go."""

    @wraps(process)
    def processing(*args: Any, **kwargs: Any) -> Any:
        if not has_context():
            return process(itself(), *args, **kwargs)
        with _IntoLane(producer):
            return process(itself(), *args, **kwargs)

    return processing


def has_context() -> bool:
    """Whether CUDA is in use in this process; asking makes no context."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is to be taken from where it is."""
    return tensor.is_cuda


class _IntoLane(TorchFunctionMode):
    """In this thread, large tensors that are moved from a GPU to the CPU land in the lane, if it has room."""

    def __init__(self, producer: Producer) -> None:
        super().__init__()
        self._producer = producer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _moves_to_cpu(func, args, kwargs):
            with guarded("copying from the GPU", "features are copied twice, which is slower"):
                if (landed := self._landed(args[0])) is not None:
                    return landed
        return func(*args, **kwargs)

    def _landed(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A copy in the lane, complete when this returns; None if it has no room, or cannot carry it."""
        if type(tensor) is not torch.Tensor or not is_on_gpu(tensor) or tensor.nbytes <= SMALL:
            return None
        if tensor.dtype not in NAMES or tensor.layout is not torch.strided or not lies_as_it_is(tensor):
            return None
        if tensor.requires_grad:
            return None
        self._producer.pin(tensor.get_device())
        room = self._producer.room_for(tensor)
        return None if room is None else fetch(tensor, room)


def fetch(tensor: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Copy from a GPU; waits, as `tensor.to("cpu")` does, until all of it is there."""
    return room.copy_(tensor)


def _moves_to_cpu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """`tensor.cpu()` or `tensor.to("cpu")`, and no more than that."""
    if func is torch.Tensor.cpu:
        return len(args) == 1 and not kwargs
    if func is not torch.Tensor.to:
        return False
    wanted = [*args[1:], *kwargs.values()]
    if len(wanted) != 1 or kwargs.keys() - {"device"} or not isinstance(wanted[0], str | torch.device):
        return False
    return torch.device(wanted[0]).type == "cpu"
