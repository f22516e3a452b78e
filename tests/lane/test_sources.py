"""What is put again is shared, what was changed is copied anew, and nothing is ever read but what was put.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mmlane.lane import Refused, points
from mmlane.lane.producer import SLOTS
from mmlane.lane.ticket import read
from tests.lane.together import PAGE, SEGMENT, Together, plain, random, same, together

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("ComplexHalf", "Sparse CSR", "torch.quantize_per_tensor", "The PyTorch API of nested")
]

SMALL = (6, 4)
LARGE = (700, 600)  # beyond 1 MiB in every dtype that is used here: copied in another way


@pytest.fixture
def pair() -> Iterator[Together]:
    with together(capacity=64 * SEGMENT) as pair:
        yield pair
        assert pair.nothing_is_out()


@pytest.fixture(scope="module")
def large() -> Iterator[Together]:
    """For what leaves nothing behind: a lane for many tests."""
    with together(capacity=1024 * SEGMENT) as pair:
        yield pair


def offset(ticket: bytes) -> int:
    return read(ticket).offset


# --- shared -------------------------------------------------------------------------------------------------


def test_the_same_tensor_twice_is_one_extent_and_two_tickets(pair: Together) -> None:
    tensor = random((3 * PAGE,))
    first, second = pair.put(tensor), pair.put(tensor)
    assert first != second and offset(first) == offset(second)
    stats = pair.lane.stats()
    assert (stats.tickets, stats.extents, stats.shared, stats.taken) == (2, 1, 1, 3 * PAGE)
    one, two = (pair.reader.take(ticket, "view") for ticket in (first, second))
    assert same(one, tensor) and same(two, tensor) and one.data_ptr() == two.data_ptr()
    del one
    assert pair.lane.stats().tickets == 1 and same(two, tensor)


def test_what_has_been_given_back_is_shared_as_long_as_its_tensor_lives(pair: Together) -> None:
    tensor = random((PAGE,))
    first = pair.put(tensor)
    pair.reader.discard(first)
    assert pair.lane.stats().kept == PAGE
    second = pair.put(tensor)
    assert offset(second) == offset(first) and pair.lane.stats().kept == 0
    assert same(pair.reader.take(second), tensor)
    del tensor
    stats = pair.lane.stats()
    assert (stats.kept, stats.taken, stats.extents) == (0, 0, 0)


def test_a_tensor_that_dies_while_its_ticket_is_out_is_freed_with_the_ticket(pair: Together) -> None:
    ticket = pair.put(random((PAGE,)))
    gc.collect()
    assert pair.lane.stats().taken == PAGE
    taken = pair.reader.take(ticket)
    assert same(taken, random((PAGE,)))
    del taken
    assert pair.lane.stats().taken == 0


@pytest.mark.parametrize(
    "alias",
    [
        lambda tensor: tensor.detach(),
        lambda tensor: tensor[:],
        lambda tensor: tensor.view(tensor.shape),
        lambda tensor: tensor.T.T,
        lambda tensor: tensor.conj().conj(),
        lambda tensor: tensor.unsqueeze(0).squeeze(0),
        lambda tensor: torch.nn.Parameter(tensor),
    ],
    ids=["detach", "slice of all", "view", "transposed twice", "conjugated twice", "squeezed", "parameter"],
)
def test_another_name_for_the_same_bytes_is_shared(pair: Together, alias: Callable[[Tensor], Tensor]) -> None:
    tensor = random(SMALL, torch.complex64)
    other = alias(tensor)
    first, second = pair.put(tensor), pair.put(other)
    assert offset(first) == offset(second)
    assert same(pair.reader.take(first), tensor) and same(pair.reader.take(second), other)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda tensor: tensor.clone(),
    "other shape": lambda tensor: tensor.view(4, 4),
    "other stride": lambda tensor: tensor.mT,
    "a part": lambda tensor: tensor[0],
    "another part": lambda tensor: tensor[:, 1],
    "offset": lambda tensor: torch.as_strided(tensor.view(-1)[1:], (2, 2, 2, 1), (0, 0, 0, 0)),
    "every other": lambda tensor: tensor[:, :, ::2],
    "other dtype of the same size": lambda tensor: tensor.view(torch.float64),
    "other dtype": lambda tensor: tensor.view(torch.float32),
    "conjugate": lambda tensor: tensor.conj(),
    "negative": lambda tensor: torch._neg_view(tensor),
    "expanded": lambda tensor: tensor[:1].expand(2, 2, 4),
    "one dimension more": lambda tensor: tensor[None],
}


@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS)
def test_other_bytes_or_the_same_seen_otherwise_are_not_shared(
    pair: Together, made: Callable[[Tensor], Tensor]
) -> None:
    tensor = random((2, 2, 4), torch.complex64)
    other = made(tensor)
    first, second, third = pair.put(tensor), pair.put(other), pair.put(tensor)
    assert offset(first) != offset(second) and offset(first) == offset(third)
    assert same(pair.reader.take(first), tensor)
    assert same(pair.reader.take(second), other)
    assert same(pair.reader.take(third), tensor)


PARTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "offset": (lambda tensor: tensor[:4], lambda tensor: tensor[4:8]),
    "shape": (lambda tensor: tensor[:4], lambda tensor: tensor[:5]),
    "stride": (lambda tensor: tensor[:4], lambda tensor: tensor[:8:2]),
    "order": (lambda tensor: tensor[:4].view(2, 2), lambda tensor: tensor[:4].view(2, 2).T),
    "dtype": (lambda tensor: tensor[:4], lambda tensor: tensor[:4].view(torch.int32)),
}


@pytest.mark.parametrize(("one", "other"), PARTS.values(), ids=PARTS)
def test_parts_of_a_tensor_that_differ_in_one_thing_are_not_shared(
    pair: Together, one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    tensor = random((16,), torch.float32)
    first, second = pair.put(one(tensor)), pair.put(other(tensor))
    assert offset(first) != offset(second) and pair.lane.stats().shared == 0
    assert same(pair.reader.take(first), one(tensor)) and same(pair.reader.take(second), other(tensor))


def test_without_sharing_every_put_is_a_copy(pair: Together) -> None:
    """The way for tensors that are written behind torch's back."""
    tensor = random((64,))
    shared = pair.put(tensor)
    tensor.data.fill_(7)
    copied = pair.put(tensor, share=False)
    again = pair.put(tensor, share=False)
    assert len({offset(shared), offset(copied), offset(again)}) == 3 and pair.lane.stats().shared == 0
    assert same(pair.reader.take(copied), tensor) and same(pair.reader.take(again), tensor)
    assert pair.lane.stats().kept == 0  # of these nothing is kept
    assert same(pair.reader.take(shared), random((64,)))


# --- changed ------------------------------------------------------------------------------------------------


def _no_grad(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(3)


def _inference(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor[1:].add_(1)


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


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda tensor: tensor.add_(1),
    "item": _item,
    "slice": _slice,
    "through a view": lambda tensor: tensor.view(-1)[3:5].zero_(),
    "through detach": lambda tensor: tensor.detach().add_(1),
    "through a view of detach": lambda tensor: tensor.detach().T[0].fill_(5),
    "through another dtype": lambda tensor: tensor.view(torch.int32).bitwise_not_(),
    "through a part": lambda tensor: tensor[1:2].copy_(torch.full((1, 4), 3.0)),
    "through chunks": lambda tensor: tensor.chunk(3)[1].neg_(),
    "by index": lambda tensor: tensor.index_fill_(0, torch.tensor([1]), 4.0),
    "by mask": lambda tensor: tensor.masked_fill_(torch.ones(SMALL, dtype=torch.bool), 6.0),
    "by foreach": lambda tensor: torch._foreach_add_([tensor], 2.0),
    "by an optimizer": _optimizer,
    "by out=": _out,
    "without gradients": _no_grad,
    "in inference mode": _inference,
    "by random numbers": lambda tensor: tensor.uniform_(),
    "through an older view": _after_another_view,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_copied_anew_and_the_ticket_before_reads_what_was_put(
    pair: Together, change: Callable[[Tensor], object]
) -> None:
    """(6)"""
    tensor = torch.arange(24.0).view(SMALL)
    before = tensor.clone()
    first, held = pair.put(tensor), pair.put(tensor)
    view = pair.reader.take(held)
    change(tensor)
    assert not torch.equal(tensor, before)
    second, third = pair.put(tensor), pair.put(tensor)
    assert offset(second) != offset(first) and offset(second) == offset(third)
    assert same(view, before) and same(pair.reader.take(first), before)
    assert same(pair.reader.take(second), tensor) and same(pair.reader.take(third), tensor)
    del view
    assert pair.lane.stats().taken == PAGE  # what was changed cannot be put again, and is not kept


def test_a_changed_tensor_whose_tickets_have_ended_frees_the_extent_at_once(pair: Together) -> None:
    tensor = random((PAGE,))
    pair.reader.discard(pair.put(tensor))
    for _ in range(5):
        tensor.add_(1)
        pair.reader.discard(pair.put(tensor))
        assert pair.lane.stats().taken == PAGE
        assert len(pair.lane._sources._identities) == len(pair.lane._sources._known) == 1
    tensor.view(64, 64).add_(1)
    assert pair.lane.stats().kept == PAGE  # not known before it is put again


@pytest.mark.parametrize("point", ["put.allocated", "put.reserved", "put.copied"])
def test_a_tensor_that_is_changed_while_it_is_put_is_not_shared(
    pair: Together, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """What another thread may do. The ticket says what was there before or after, the next one what is there."""
    tensor = random((100,))
    before = tensor.clone()

    def probe(name: str) -> None:
        if name == point:
            tensor.add_(1)

    monkeypatch.setattr(points, "probe", probe)
    first = pair.put(tensor)
    monkeypatch.setattr(points, "probe", None)
    second = pair.put(tensor)
    assert offset(second) != offset(first)
    assert same(pair.reader.take(first), before if point == "put.copied" else tensor)
    assert same(pair.reader.take(second), tensor)
    assert pair.lane.stats().taken == PAGE


def test_a_copy_of_what_was_changed_on_its_way_is_not_kept(
    pair: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random((100,))
    monkeypatch.setattr(points, "probe", lambda name: tensor.add_(1) if name == "put.copied" else None)
    pair.reader.discard(pair.put(tensor))
    assert pair.lane.stats().taken == 0


def test_a_tensor_that_is_put_twice_at_the_same_time_is_kept_once(
    pair: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random((100,))
    inner: list[bytes] = []

    def probe(name: str) -> None:
        if name == "put.copied" and len(inner) < 3:
            inner.append(b"")
            inner.append(pair.put(tensor))

    monkeypatch.setattr(points, "probe", probe)
    outer = pair.put(tensor)
    monkeypatch.setattr(points, "probe", None)
    tickets = [outer, *filter(None, inner), pair.put(tensor)]
    assert len(tickets) == 5 and len({offset(ticket) for ticket in tickets}) == 4  # the last one is shared
    for ticket in tickets:
        assert same(pair.reader.take(ticket), tensor)
    assert pair.lane.stats().taken == PAGE


# --- storages that come and go ------------------------------------------------------------------------------


def test_an_address_that_is_used_again_is_another_tensor(pair: Together) -> None:
    """torch uses the memory of a freed tensor for the next one: same address, size and version, other bytes."""
    addresses: set[int] = set()
    storages: set[int] = set()
    kept: list[bytes] = []
    for number in range(4000):
        tensor = torch.full((200,), number, dtype=torch.int64)
        addresses.add(tensor.data_ptr())
        storages.add(tensor.untyped_storage()._cdata)
        ticket = pair.put(tensor)
        if number % 3 == 0:
            assert int(pair.reader.take(ticket)[number % 200]) == number
        elif number % 3 == 1:
            kept.append(ticket)
        else:
            pair.lane.withdraw(ticket)
        if len(kept) == 100:
            del tensor
            for late, ticket in enumerate(kept, start=number // 3 - 99):
                assert torch.equal(pair.reader.take(ticket), torch.full((200,), late * 3 + 1, dtype=torch.int64))
            kept.clear()
    assert len(addresses) < 1000 and len(storages) < 4000  # or this would prove nothing
    assert pair.lane.stats().shared == 0
    for ticket in kept:
        pair.reader.discard(ticket)
    del tensor
    assert pair.lane.stats().taken == 0


def test_a_storage_that_was_swapped_under_a_tensor_is_another_source(pair: Together) -> None:
    tensor, other = random((50,), seed=1), random((50,), seed=2)
    first = pair.put(tensor)
    tensor.data = other
    second = pair.put(tensor)
    tensor.set_(random((50,), seed=3).untyped_storage())
    third = pair.put(tensor)
    for seed, ticket in enumerate((first, second, third), start=1):
        assert same(pair.reader.take(ticket), random((50,), seed=seed))


def test_the_lane_keeps_no_tensor_alive(pair: Together) -> None:
    tensor = random((1000,))
    storage = weakref.ref(tensor.untyped_storage())
    ticket = pair.put(tensor)
    assert storage() is not None
    del tensor
    assert storage() is None
    pair.reader.discard(ticket)


@pytest.mark.parametrize("size", [PAGE, SEGMENT, 20 * SEGMENT, 64 * SEGMENT])
def test_kept_extents_are_given_up_when_room_is_short(pair: Together, size: int) -> None:
    tensors = [random((SEGMENT,), seed=seed) for seed in range(64)]
    for tensor in tensors:
        pair.reader.discard(pair.put(tensor))
    assert pair.lane.stats().kept == pair.lane.stats().capacity
    large = random((size,), seed=99)
    ticket = pair.put(large)
    if size <= SEGMENT:
        assert pair.lane.stats().kept == 63 * SEGMENT  # no more than need be
    assert same(pair.reader.take(ticket), large)
    del large
    for tensor in tensors:  # all that is shared is what it was
        assert same(pair.reader.take(pair.put(tensor)), tensor)
    assert pair.lane.stats().refused == {}


def test_a_lane_full_of_kept_extents_goes_on_for_ever(pair: Together) -> None:
    """Each of these tensors lives, none is put again: nothing but giving up makes room."""
    alive = []
    for number in range(500):
        tensor = torch.full((3 * SEGMENT + 5,), number % 251, dtype=torch.uint8)
        alive.append(tensor)
        taken = pair.reader.take(pair.put(tensor))
        assert int(taken[0]) == int(taken[-1]) == number % 251
        del taken, tensor
        if len(alive) > 40:
            del alive[0]


def test_what_tickets_refer_to_is_not_given_up(pair: Together) -> None:
    """(6)"""
    tensors = [random((8 * SEGMENT,), seed=seed) for seed in range(8)]
    out = [pair.put(tensor) for tensor in tensors]
    refused = pair.lane.put(random((1,)))
    assert isinstance(refused, Refused) and refused.cause == "full"
    pair.reader.discard(out[3])
    again = pair.put(random((8 * SEGMENT,), seed=9))
    assert offset(again) == offset(out[3])
    for ticket, tensor in zip(out, tensors, strict=True):
        if ticket is not out[3]:
            assert same(pair.reader.take(ticket), tensor)
    assert same(pair.reader.take(again), random((8 * SEGMENT,), seed=9))


def test_when_all_tickets_are_out_nothing_is_lost(pair: Together) -> None:
    tensor = random((10,))
    tickets = [pair.put(tensor) for _ in range(SLOTS)]
    assert len(set(tickets)) == SLOTS
    books = pair.books()
    for share in (True, False):
        assert f"{SLOTS} tickets are out" in pair.refused(tensor, share=share).detail
    other = random((10,), seed=1)
    assert pair.refused(other, share=False).cause == "full"
    assert pair.books() == books
    refused = pair.lane.put(other)  # was copied, and is known from now on
    assert isinstance(refused, Refused) and refused.cause == "full"
    assert pair.lane.stats().kept == PAGE
    other.add_(1)
    assert isinstance(pair.lane.put(other), Refused)
    assert pair.lane.stats().kept == PAGE  # the one of before its change is not
    assert same(pair.reader.take(tickets[-1]), tensor)
    assert same(pair.reader.take(pair.put(other)), other)
    for ticket in tickets[:-1]:
        pair.lane.withdraw(ticket)
    assert pair.lane.stats().tickets == 0


def test_the_same_tensors_from_several_threads_at_once(pair: Together) -> None:
    tensors = [random((5000,), seed=seed) for seed in range(3)]
    problems: list[str] = []
    start = threading.Barrier(4)

    def work(which: int) -> None:
        start.wait(60)
        for turn in range(150):
            number = (which + turn) % 3
            ticket = pair.lane.put(tensors[number])
            if isinstance(ticket, Refused):
                problems.append(ticket.detail)
            elif not same(pair.reader.take(ticket), tensors[number]):
                problems.append(f"thread {which}, turn {turn}: other bytes")

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert problems == []
    stats = pair.lane.stats()
    assert (stats.tickets, stats.puts, stats.taken) == (0, 600, 3 * 2 * PAGE)
    tensors.clear()
    assert pair.lane.stats().taken == 0


# --- every kind of tensor -----------------------------------------------------------------------------------


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
    "inference": lambda shape: _inferred(shape),
}


def _inferred(shape: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        return torch.full(shape, 2.0)


@pytest.mark.parametrize(
    "surroundings", [nullcontext, torch.no_grad, torch.inference_mode], ids=["", "no grad", "inf"]
)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_dense_tensor_arrives(
    large: Together,
    kind: Callable[[tuple[int, ...]], Tensor],
    shape: tuple[int, ...],
    surroundings: Callable[[], AbstractContextManager[Any]],
) -> None:
    tensor = kind(shape)
    wanted = plain(tensor).clone()
    with surroundings():
        tickets = [large.put(tensor), large.put(tensor, share=False)]
        for ticket in tickets:
            taken = large.reader.take(ticket)
            assert type(taken) is Tensor and taken.is_contiguous() and not taken.requires_grad
            assert not taken.is_conj() and not taken.is_neg()
            assert (taken.dtype, taken.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(plain(taken), wanted)
    del taken
    assert large.nothing_is_out()
    assert torch.equal(plain(tensor), wanted)  # the source is as it was


def test_inference_tensors_are_never_shared(pair: Together) -> None:
    """torch does not count their changes."""
    tensor = _inferred(SMALL)
    first = pair.put(tensor)
    with torch.inference_mode():
        before = tensor.clone()
        tensor.add_(1)
    second, third = pair.put(tensor), pair.put(tensor)
    assert len({offset(first), offset(second), offset(third)}) == 3
    assert same(pair.reader.take(first), before) and same(pair.reader.take(second), tensor)
    pair.reader.discard(third)
    assert pair.lane.stats().taken == 0


def test_a_view_of_a_normal_tensor_made_in_inference_mode_is_counted_with_it(pair: Together) -> None:
    tensor = torch.zeros(SMALL)
    with torch.inference_mode():
        alias = tensor[:]
        first = pair.put(alias)
        alias.add_(1)
        second = pair.put(tensor)
    assert int(pair.reader.take(first).sum()) == 0 and int(pair.reader.take(second).sum()) == 24


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), LARGE], ids=str)
def test_the_default_device_and_dtype_do_not_matter(pair: Together, device: str, shape: tuple[int, ...]) -> None:
    """Engines set them while they load models."""
    tensor = random(shape, torch.float32)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            taken = pair.reader.take(pair.put(tensor))
    finally:
        torch.set_default_dtype(dtype)
    assert taken.device.type == "cpu" and same(taken, tensor)


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
    "none": (lambda: None, "NoneType"),
    "a number": (lambda: 5, "int"),
    "bytes": (lambda: b"abc", "bytes"),
    "a list": (lambda: [torch.zeros(3)], "list"),
    "an array": (lambda: numpy.zeros(3), "ndarray"),
    "a storage": (lambda: torch.zeros(3).untyped_storage(), "UntypedStorage"),
    "a type": (lambda: Tensor, "_TensorMeta"),
}


@pytest.mark.parametrize(("made", "says"), UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("share", [True, False], ids=["share", "copy"])
def test_what_is_not_plain_is_refused(pair: Together, made: Callable[[], Any], says: str, share: bool) -> None:
    refused = pair.refused(made(), share=share)
    assert refused.cause == "unsupported" and says in refused.detail
    assert same(pair.reader.take(pair.put(random((5,)))), random((5,)))


# --- anything -----------------------------------------------------------------------------------------------


class Tensors(RuleBasedStateMachine):
    """Tensors that are viewed, changed, put, dropped in any order, beside copies of what tickets have to read."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = together(capacity=32 * PAGE, segment=2 * PAGE)
        self.pair = self.scope.__enter__()
        self.tensors: list[Tensor] = []
        self.out: list[tuple[bytes, Tensor]] = []
        self.taken: list[tuple[Tensor, Tensor]] = []

    @precondition(lambda self: len(self.tensors) < 8)
    @rule(pages=st.integers(0, 3), seed=st.integers(0, 9))
    def make(self, pages: int, seed: int) -> None:
        self.tensors.append(random((pages * PAGE // 8 + 8,), torch.float32, seed).nan_to_num_())

    @precondition(lambda self: 0 < len(self.tensors) < 10)
    @rule(data=st.data(), how=st.integers(0, 5))
    def alias(self, data: st.DataObject, how: int) -> None:
        self.add_alias(data, how)

    @precondition(lambda self: 0 < len(self.tensors) < 8)
    @rule(data=st.data(), how=st.lists(st.integers(0, 5), min_size=2, max_size=4))
    def aliases(self, data: st.DataObject, how: list[int]) -> None:
        for one in how:
            self.add_alias(data, one)

    def add_alias(self, data: st.DataObject, how: int) -> None:
        tensor = data.draw(st.sampled_from(range(len(self.tensors))), "tensor")
        base = self.tensors[tensor]
        self.tensors.append(
            [
                lambda: base.detach(),
                lambda: base[:],
                lambda: base[1:],
                lambda: base[:-1],
                lambda: base[::2],
                lambda: base.view(-1, 1)[:, 0],
            ][how]()
        )

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), how=st.integers(0, 3))
    def change(self, data: st.DataObject, how: int) -> None:
        tensor = self.tensors[data.draw(st.sampled_from(range(len(self.tensors))), "tensor")]
        [
            lambda: tensor.add_(1),
            lambda: tensor.view(-1)[:1].fill_(how),
            lambda: tensor.detach().neg_(),
            lambda: tensor.copy_(tensor.flip(0)),
        ][how]()

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.tensors[data.draw(st.sampled_from(range(len(self.tensors))), "tensor")]

    @precondition(lambda self: self.tensors)
    @rule()
    def put_all(self) -> None:
        for tensor in self.tensors:
            self.check_put(tensor, share=True)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), share=st.sampled_from([True, True, True, False]))
    def put(self, data: st.DataObject, share: bool) -> None:
        self.check_put(self.tensors[data.draw(st.sampled_from(range(len(self.tensors))), "tensor")], share)

    def check_put(self, tensor: Tensor, share: bool) -> None:
        ticket = self.pair.lane.put(tensor, share=share)
        if isinstance(ticket, Refused):
            assert ticket.cause == "full"
            held = {offset(out): -(-max(read(out).nbytes, 1) // PAGE) for out, _ in self.out}
            assert held or self.taken  # never while only kept extents fill the lane
        else:
            self.out.append((ticket, tensor.clone()))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), fate=st.sampled_from(["take", "take", "discard", "withdraw"]))
    def end(self, data: st.DataObject, fate: str) -> None:
        ticket, wanted = self.out.pop(data.draw(st.sampled_from(range(len(self.out))), "ticket"))
        if fate == "take":
            self.taken.append((self.pair.reader.take(ticket), wanted))
        elif fate == "discard":
            self.pair.reader.discard(ticket)
        else:
            self.pair.lane.withdraw(ticket)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        del self.taken[data.draw(st.sampled_from(range(len(self.taken))), "tensor")]

    @invariant()
    def what_is_held_is_what_was_put(self) -> None:
        assert all(same(tensor, wanted) for tensor, wanted in self.taken)

    @invariant()
    def the_books_are_right(self) -> None:
        stats = self.pair.lane.stats()
        assert stats.tickets == len(self.out) + sum(tensor.numel() > 0 for tensor, _ in self.taken)
        assert stats.strays == stats.orphans == 0

    def teardown(self) -> None:
        for ticket, wanted in self.out:
            assert same(self.pair.reader.take(ticket), wanted)
        self.taken.clear()
        self.tensors.clear()
        assert self.pair.lane.stats().taken == 0
        self.scope.__exit__(None, None, None)


Tensors.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTensors = Tensors.TestCase
