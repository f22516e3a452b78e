"""Which extent holds a copy of which tensor, so that a tensor that is put again is not copied again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mmlane.lane.ledger import Extent

# storage, offset in it, shape, stride, dtype, conjugate and negative bits: what makes two tensors the same bytes
Key = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype, bool, bool]


@dataclass(frozen=True)
class _Source:
    storage: StorageWeakRef  # keeps the storage's address from being used again
    version: int
    extent: Extent


class Sources:
    """Tensors that were put, by identity. A storage is watched, not kept alive.

    A change in place is noticed by torch's version counter. Writes that torch does not see (through numpy,
    dlpack, `.data`) are not noticed; inference tensors have no counter and are never shared.
    """

    def __init__(self) -> None:
        self._by_key: dict[Key, _Source] = {}
        self._keys: dict[Extent, Key] = {}

    @staticmethod
    def version(tensor: torch.Tensor) -> int | None:
        """torch's count of changes to a tensor; None when it keeps none."""
        return None if tensor.is_inference() else tensor._version

    def find(self, tensor: torch.Tensor) -> Extent | None:
        """The extent that holds a tensor as it is now."""
        if tensor.is_inference() or not self._by_key:
            return None
        source = self._by_key.get(_key(tensor))
        if source is None or source.version != tensor._version:
            return None
        return source.extent

    def add(self, tensor: torch.Tensor, version: int, extent: Extent) -> Extent | None:
        """An extent holds a tensor as of a version. Returns the extent that held an earlier version of it."""
        key = _key(tensor)
        earlier = self._by_key.get(key)
        if earlier is not None:
            del self._keys[earlier.extent]
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._by_key[key] = _Source(storage, version, extent)
        self._keys[extent] = key
        return None if earlier is None else earlier.extent

    def is_gone(self, extent: Extent) -> bool:
        """Whether the tensor that an extent holds cannot be put again, since its storage is gone."""
        return bool(self._by_key[self._keys[extent]].storage.expired())  # type: ignore[no-untyped-call]

    def forget(self, extent: Extent) -> None:
        """An extent is free. Raises KeyError when it is not known."""
        del self._by_key[self._keys.pop(extent)]


def _key(tensor: torch.Tensor) -> Key:
    return (
        tensor.untyped_storage()._cdata,
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
