"""The tensors that are sent, and how to tell that the right ones arrived."""

from __future__ import annotations

import ctypes
import mmap
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mmlane.bench.clock import seconds, stamp

_WORD = 8
_MAP_POPULATE = 0x8000  # Python names it from 3.10 on, mypy does not
_PAGE = 4096
_SAMPLED_PAGES = 2048
_STEP = 0x9E3779B97F4B  # odd: adding it changes every word
_SEED = 1 << 20


class Payload:
    """Random words in the producer's own memory, and a second buffer of the same size for a plain copy of them.

    Every round has new tensors over the same memory: a transport that knows a tensor it has seen must not know
    these, and no round pays for fresh pages of the source.
    """

    def __init__(self, nbytes: int, items: int) -> None:
        self._items = items
        self._source = _anonymous(nbytes)
        self._target = _anonymous(nbytes)
        self._words = torch.frombuffer(self._source, dtype=torch.int64)
        seed = self._words[:_SEED].random_()  # drawing them all would take ten times as long
        for start in range(_SEED, self._words.numel(), _SEED):
            block = self._words[start : start + _SEED]
            torch.add(seed[: block.numel()], _STEP * (start // _SEED), out=block)
        self._copies = self._split(self._target)

    def refresh(self) -> list[Tensor]:
        """Other values, in tensors with storages of their own."""
        self._words.add_(_STEP)
        return self._split(self._source)

    def copy(self, tensors: Sequence[Tensor]) -> float:
        """Seconds for a plain copy of all of them."""
        before = stamp()
        for target, tensor in zip(self._copies, tensors, strict=True):
            target.copy_(tensor)
        return seconds(stamp() - before)

    def _split(self, memory: mmap.mmap) -> list[Tensor]:
        each = len(memory) // self._items
        return [
            torch.frombuffer(memory, dtype=torch.int64, count=each // _WORD, offset=each * i)
            for i in range(self._items)
        ]


def sums(tensors: Sequence[Tensor]) -> list[int]:
    """Reads every byte; exact, modulo 2^64."""
    return [int(tensor.sum()) for tensor in tensors]


def sample(tensors: Sequence[Tensor]) -> int:
    """A checksum over pages spread evenly; unlike the sums it knows the order."""
    checksum = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        step = max(_PAGE, nbytes // max(1, _SAMPLED_PAGES // len(tensors)) // _PAGE * _PAGE)
        for offset in range(0, nbytes, step):
            page = ctypes.string_at(tensor.data_ptr() + offset, min(_PAGE, nbytes - offset))
            checksum = zlib.crc32(page, checksum)
    return checksum


def _anonymous(nbytes: int) -> mmap.mmap:
    # Private: what Python maps without these flags would count as shared memory. All of it in memory at once.
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_POPULATE)
