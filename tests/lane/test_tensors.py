"""Every kind of dense tensor arrives; what is more than plain bytes is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.lane.harness.lane_with_readers import LaneWithReaders, published
from tests.lane.harness.payloads import inferred, plain, random, same
from tests.lane.ways_to_write import SMALL

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("ComplexHalf", "Sparse CSR", "torch.quantize_per_tensor", "The PyTorch API of nested")
]

LARGE = (700, 600)  # beyond 1 MiB in every dtype that is used here: copied in another way


def _base(shape: tuple[int, ...]) -> Tensor:
    return random(shape, torch.complex64, seed=len(shape))


KINDS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "requires grad": lambda shape: torch.ones(shape).requires_grad_(),
    "not a leaf": lambda shape: torch.ones(shape, requires_grad=True) * 2,
    "parameter": lambda shape: torch.nn.Parameter(torch.full(shape, 3.0)),
    "buffer": lambda shape: torch.nn.Buffer(torch.full(shape, 3.0)),
    "conjugate": lambda shape: _base(shape).conj(),
    "negative": lambda shape: _base(shape).conj().imag,
    "conjugate and transposed": lambda shape: _base(shape).mH,
    "imaginary part": lambda shape: _base(shape).imag,
    "transposed": lambda shape: _base(shape).T,
    "every other": lambda shape: _base((shape[0] * 2, shape[1]))[::2],
    "every other column": lambda shape: _base((shape[0], shape[1] * 2))[:, 1::2],
    "flipped": lambda shape: _base(shape).flip(0),
    "channels last": lambda shape: _base((2, 3, *shape)).contiguous(memory_format=torch.channels_last),
    "expanded": lambda shape: _base((shape[0], 1)).expand(shape),
    "expanded from one": lambda shape: torch.tensor(3.5).expand(shape),
    "overlapping": lambda shape: _base((shape[0] + shape[1],)).unfold(0, shape[1], 1),
    "offset": lambda shape: _base((shape[0] + 1, shape[1]))[1:],
    "odd offset": lambda shape: random((shape[0] * shape[1] * 4 + 1,))[1:],
    "from numpy": lambda shape: torch.from_numpy(numpy.ones(shape)),
    "in shared memory": lambda shape: torch.ones(shape).share_memory_(),  # type: ignore[no-untyped-call]
    "inference": lambda shape: inferred(shape),
}


@pytest.mark.parametrize(
    "surroundings", [nullcontext, torch.no_grad, torch.inference_mode], ids=["", "no grad", "inf"]
)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_dense_tensor_arrives(
    large: LaneWithReaders,
    kind: Callable[[tuple[int, ...]], Tensor],
    shape: tuple[int, ...],
    surroundings: Callable[[], AbstractContextManager[Any]],
) -> None:
    tensor = kind(shape)
    wanted = plain(tensor).clone()
    with surroundings(), large.copy(tensor) as copy:
        assert type(copy.tensor) is Tensor and copy.tensor.is_contiguous() and not copy.tensor.requires_grad
        assert (copy.tensor.dtype, copy.tensor.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(plain(copy.tensor), wanted)
        for ticket in (large.put(tensor), published(copy), published(copy)):
            taken = large.reader.take(ticket)
            assert type(taken) is Tensor and taken.is_contiguous() and not taken.requires_grad
            assert not taken.is_conj() and not taken.is_neg()
            assert (taken.dtype, taken.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(plain(taken), wanted)
    del taken
    assert large.nothing_is_out()
    assert torch.equal(plain(tensor), wanted)  # the source is as it was


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), LARGE], ids=str)
def test_the_default_device_and_dtype_do_not_matter(
    wide: LaneWithReaders, device: str, shape: tuple[int, ...]
) -> None:
    """Engines set them while they load models."""
    tensor = random(shape, torch.float32)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            taken = wide.reader.take(wide.put(tensor))
            with wide.copy(tensor) as copy:
                another = wide.reader.take(published(copy))
    finally:
        torch.set_default_dtype(dtype)
    for each in (taken, another):
        assert each.device.type == "cpu" and same(each, tensor)


class Subclass(Tensor):
    """A tensor that may mean more than its bytes."""


def _without_memory() -> Tensor:
    tensor = torch.zeros(8)
    tensor.untyped_storage().resize_(0)  # as sharded training does it
    return tensor


def _within(transform: Callable[[Callable[[Tensor], Any]], Callable[..., Any]], tensor: Tensor) -> Tensor:
    """What a function sees within one of torch's transformations."""
    seen: list[Tensor] = []

    def function(inner: Tensor) -> Tensor:
        seen.append(inner)
        return inner.sum()

    transform(function)(tensor)
    return seen[0]


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "mkldnn"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), "qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "dense"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        "NestedTensor",
    ),
    "packed bits": (lambda: torch.zeros(3, dtype=torch.uint8).view(vars(torch)["uint4"]), "uint4"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Subclass), "Subclass"),
    "subclass of parameter": (lambda: torch.nn.UninitializedParameter(), "UninitializedParameter"),
    "more dimensions than a ticket can say": (lambda: torch.zeros((1,) * 256), "256 dimensions"),
    "memory that was freed": (_without_memory, "memory"),
    "zeros without memory": (lambda: torch._efficientzerotensor((3,)), "memory"),
    "within vmap": (lambda: _within(torch.vmap, torch.zeros(2, 3)), "memory"),
    "within grad": (lambda: _within(torch.func.grad, torch.zeros(3)), "memory"),
    "within functionalize": (lambda: _within(torch.func.functionalize, torch.zeros(3)), "memory"),
}
NO_TENSOR: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "NoneType"),
    "a number": (lambda: 5, "int"),
    "bytes": (lambda: b"abc", "bytes"),
    "a list": (lambda: [torch.zeros(3)], "list"),
    "an array": (lambda: numpy.zeros(3), "ndarray"),
    "a storage": (lambda: torch.zeros(3).untyped_storage(), "UntypedStorage"),
    "a type": (lambda: Tensor, "_TensorMeta"),
}


@pytest.mark.parametrize(("made", "says"), UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_not_plain_is_refused(
    wide: LaneWithReaders, made: Callable[[], Any], says: str, kept: bool
) -> None:
    refused = wide.refused(made(), kept=kept)
    assert refused.cause == "unsupported" and says in refused.detail
    assert same(wide.reader.take(wide.put(random((5,)))), random((5,)))


@pytest.mark.parametrize(("made", "says"), NO_TENSOR.values(), ids=NO_TENSOR)
@pytest.mark.parametrize("kept", [False, True])
def test_an_argument_that_is_not_a_tensor_is_a_type_error(
    wide: LaneWithReaders, made: Callable[[], Any], says: str, kept: bool
) -> None:
    before = wide.figures()
    with pytest.raises(TypeError, match=f"tensor is of type {says}: wanted a torch.Tensor"):
        (wide.lane.copy if kept else wide.lane.put)(made())
    assert wide.figures() == before
    assert same(wide.reader.take(wide.put(random((5,)))), random((5,)))
