"""Which extent holds a copy of which tensor, so that a tensor that is put again is not copied again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mmlane.lane.ledger import Extent

# What makes two tensors the same bytes, but for changes in place: storage, offset in it, shape, stride, dtype, and
# whether what is stored is the conjugate or the negative.
Identity = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype, bool, bool]


def identity(tensor: torch.Tensor) -> Identity | None:
    """A tensor's identity; None for an inference tensor: torch does not count its changes."""
    if tensor.is_inference():
        return None
    return (
        tensor.untyped_storage()._cdata,
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    storage: StorageWeakRef  # keeps the storage's address from being used again
    version: int
    extent: Extent


class Sources:
    """Tensors that were put, by identity. A storage is watched, not kept alive.

    A change in place is noticed by torch's version counter. Writes that torch does not see (through numpy,
    dlpack, `.data`) are not noticed.
    """

    def __init__(self) -> None:
        self._known: dict[Identity, _Source] = {}
        self._identities: dict[Extent, Identity] = {}

    def find(self, identity: Identity, version: int) -> Extent | None:
        """The extent that holds a tensor as of a version."""
        source = self._known.get(identity)
        return None if source is None or source.version != version else source.extent

    def add(self, identity: Identity, version: int, tensor: torch.Tensor, extent: Extent) -> Extent | None:
        """An extent holds a tensor as of a version. Returns the extent that held an earlier version of it."""
        earlier = self._known.get(identity)
        if earlier is not None:
            del self._identities[earlier.extent]
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[identity] = _Source(storage, version, extent)
        self._identities[extent] = identity
        return None if earlier is None else earlier.extent

    def is_gone(self, extent: Extent) -> bool:
        """Whether the tensor that an extent holds cannot be put again, since its storage is gone."""
        return bool(self._known[self._identities[extent]].storage.expired())  # type: ignore[no-untyped-call]

    def forget(self, extent: Extent) -> None:
        """An extent is free. Raises KeyError when it is not known."""
        del self._known[self._identities.pop(extent)]
