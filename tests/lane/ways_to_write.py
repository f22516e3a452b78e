"""Everything that writes to a tensor, with or without torch's knowledge."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = (6, 4)  # what is written to

_operators: Any = torch.library
_library = _operators.Library("mmlane_tests", "FRAGMENT")
_library.define("fill(Tensor(a!) tensor) -> ()")
_library.impl("fill", lambda tensor: tensor.numpy().fill(11), "CPU")


@torch.library.custom_op("mmlane_tests::fill_too", mutates_args=("tensor",))
def _fill_too(tensor: Tensor) -> None:
    tensor.numpy().fill(12)


def _no_grad(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(3)


def _inference(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor[1:].add_(1)


def _uncounted(tensor: Tensor) -> None:
    with vars(torch.autograd)["_unsafe_preserve_version_counter"](tensor):
        tensor.add_(1)


def _optimizer(tensor: Tensor) -> None:
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0, foreach=True).step()


def _out(tensor: Tensor) -> None:
    torch.add(tensor, 1, out=tensor)


def _item(tensor: Tensor) -> None:
    tensor[2, 1] = 99


def _slice(tensor: Tensor) -> None:
    tensor[:, 1:3] = -1


def _after_another_view(tensor: Tensor) -> None:
    view = tensor.view(-1)
    tensor.add_(0)
    view[5:6].fill_(8)


def _data(tensor: Tensor) -> None:
    tensor.data = torch.full_like(tensor, 6.0)


def _resized(tensor: Tensor) -> None:  # as sharded training does it
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    tensor.data.fill_(7)


def _shared_memory(tensor: Tensor) -> None:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    tensor.data.add_(1)


def _untyped(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


WRITES: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda tensor: tensor.numpy().fill(4),
    "numpy, a part": lambda tensor: tensor.numpy()[1:2].fill(4),
    "data": lambda tensor: tensor.data.add_(1),
    "dlpack": lambda tensor: torch.from_dlpack(torch.to_dlpack(tensor)).fill_(9),  # type: ignore[attr-defined]
    "its address": lambda tensor: ctypes.memset(tensor.data_ptr(), 1, 5),
    "its storage": lambda tensor: _untyped(tensor).fill_(1),
    "a storage copied to its own": lambda tensor: tensor.untyped_storage().copy_(
        torch.ones_like(tensor).untyped_storage()
    ),
    "its storage resized": _resized,
    "its storage seen by another tensor": lambda tensor: (
        torch.empty(0).set_(tensor.untyped_storage(), 0, (24,), (1,)).fill_(3)
    ),
    "another storage": lambda tensor: tensor.set_(torch.full(SMALL, 5.0).untyped_storage(), 0, SMALL, (4, 1)),
    "other data": _data,
    "swap_tensors": lambda tensor: vars(torch.utils)["swap_tensors"](tensor, torch.full_like(tensor, 2.0)),
    "shared memory": _shared_memory,
    "uncounted": _uncounted,
    "an operator": lambda tensor: torch.ops.mmlane_tests.fill(tensor),
    "a custom operator": _fill_too,
    "compiled": lambda tensor: torch.compile(lambda inner: inner.add_(1), backend="aot_eager")(tensor),
    "add_": lambda tensor: tensor.add_(1),
    "relu_": lambda tensor: torch.relu_(tensor.sub_(3)),
    "item": _item,
    "slice": _slice,
    "a view": lambda tensor: tensor.view(-1)[3:5].zero_(),
    "detach": lambda tensor: tensor.detach().add_(1),
    "a view of detach": lambda tensor: tensor.detach().T[0].fill_(5),
    "another dtype": lambda tensor: tensor.view(torch.int32).bitwise_not_(),
    "a part": lambda tensor: tensor[1:2].copy_(torch.full((1, 4), 3.0)),
    "chunks": lambda tensor: tensor.chunk(3)[1].neg_(),
    "index_fill_": lambda tensor: tensor.index_fill_(0, torch.tensor([1]), 4.0),
    "scatter_": lambda tensor: tensor.scatter_(0, torch.tensor([[1, 1, 1, 1]]), 3.0),
    "masked_fill_": lambda tensor: tensor.masked_fill_(torch.ones(SMALL, dtype=torch.bool), 6.0),
    "foreach add": lambda tensor: torch._foreach_add_([tensor], 2.0),
    "foreach copy": lambda tensor: torch._foreach_copy_([tensor], [torch.ones_like(tensor)]),
    "an optimizer": _optimizer,
    "out=": _out,
    "without gradients": _no_grad,
    "inference mode": _inference,
    "random numbers": lambda tensor: tensor.uniform_(),
    "an older view": _after_another_view,
}
