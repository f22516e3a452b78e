"""Tensors that tell where they are from, and what is wrong with one that arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from mmlane.lane import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
SHAPE = (3, 1000)  # of float32: three pages


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as its reader should see them."""
    resolved = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Of one element or none, a contiguous tensor may have any strides, which `view` minds.
    return resolved.as_strided((resolved.numel(),), (1,)).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte are the same (not values: a NaN is itself)."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(plain(left), plain(right))


def random(shape: Sequence[int], dtype: torch.dtype = torch.uint8, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, in any dtype."""
    count = torch.Size(shape).numel()
    raw = torch.randint(
        0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def inferred(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor made in inference mode."""
    with torch.inference_mode():
        return torch.full(shape, 2.0)


# --- stamps: a wrong byte tells where it is from -----------------------------------------------------------


def stamp(seed: int, nbytes: int) -> torch.Tensor:
    """Bytes that tell where they are from: 64-bit words, the seed in the upper half, the position in the lower.

    So any word of another payload, or from elsewhere in the same, is a wrong one.
    """
    words = torch.arange(-(-nbytes // 8), dtype=torch.int64)
    words += seed << 32
    return words.view(torch.uint8)[:nbytes]


def difference(tensor: torch.Tensor, seed: int, nbytes: int) -> str:
    """What is wrong with a payload, looked at in whole; empty when nothing is."""
    if (tensor.dtype, tuple(tensor.shape)) != (torch.uint8, (nbytes,)):
        return f"{tensor.dtype} of shape {tuple(tensor.shape)} instead of {nbytes} bytes"
    wanted = stamp(seed, nbytes)
    if torch.equal(tensor, wanted):
        return ""
    wrong = (tensor != wanted).nonzero()
    if not len(wrong):
        return "a difference that was gone at the second look"
    first = int(wrong[0])
    found = tensor[first - first % 8 :][:8].tolist()
    source = int.from_bytes(bytes(found[4:8]), "little")
    return (
        f"payload {seed} of {nbytes} bytes: {len(wrong)} wrong, from byte {first} on: {found}, as if of {source}"
    )


@dataclass(frozen=True)
class Sent:
    """A ticket, and what its tensor has to look like."""

    ticket: bytes
    seed: int
    nbytes: int
