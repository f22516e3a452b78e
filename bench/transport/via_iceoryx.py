"""iceoryx2, publish-subscribe: a loaned sample of bytes a tensor, one copy into it, tensors over received ones.

The publisher grows its memory as larger samples are asked for, and keeps it; freed samples are used again, already
in memory. A message only says that samples have been sent, and their sizes: a subscriber polls.
"""

from __future__ import annotations

import ctypes
import itertools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import iceoryx2 as iox
import torch
from torch import Tensor

from mmlane.bench import contract
from mmlane.bench.case import Case
from mmlane.bench.workers import Refusal

_ALIGNMENT = 64
_FIRST_SLICE = 64 << 10


class Producer(contract.Producer):
    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        self._names = (f"mmlane-bench/{number}" for number in itertools.count())

    def open(self, case: Case) -> str:
        self._node = _node(self.scratch)
        name = next(self._names)
        self._readers = case.readers
        self._service = _service(self._node, name, case)
        publisher = self._service.publisher_builder().initial_max_slice_len(_FIRST_SLICE)
        self._publisher = publisher.allocation_strategy(iox.AllocationStrategy.PowerOfTwo).create()
        return name

    def ready(self) -> None:
        self._publisher.update_connections()

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            try:
                sample = self._publisher.loan_slice_uninit(nbytes)
            except iox.LoanError as error:
                raise Refusal(f"cannot loan a sample of {nbytes} bytes: {error}") from error
            _over(sample.payload_ptr, tensor.dtype, nbytes).copy_(tensor.view(-1))
            received = sample.assume_init().send()
            if received != self._readers:
                raise Refusal(f"a sample of {nbytes} bytes reached {received} of {self._readers} subscribers")
        return [pickle.dumps([(tensor.dtype, tensor.shape) for tensor in tensors])] * self._readers

    def close(self) -> None:
        self._publisher.delete()
        del self._publisher, self._service, self._node
        for left in Path("/dev/shm").glob(f"{_prefix(self.scratch)}*"):
            left.unlink()


class Reader(contract.Reader):
    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        self._samples: list[Any] = []

    def open(self, address: str, rank: int, case: Case) -> None:
        self._node = _node(self.scratch)
        self._service = _service(self._node, address, case)
        self._subscriber = self._service.subscriber_builder().create()

    def take(self, message: bytes) -> Sequence[Tensor]:
        return list(self._receive(message))

    def _receive(self, message: bytes) -> Iterator[Tensor]:
        for dtype, shape in pickle.loads(message):
            sample = self._subscriber.receive()
            self._samples.append(sample)
            yield _over(sample.payload_ptr, dtype, shape.numel() * dtype.itemsize).view(shape)

    def free(self) -> None:
        for sample in self._samples:
            sample.delete()
        self._samples.clear()

    def close(self) -> None:
        self._subscriber.delete()
        del self._subscriber, self._service, self._node


def _node(scratch: Path) -> Any:
    """A participant in a system of our own, whose files go with the run."""
    config = iox.config.default()
    config.global_cfg.root_path = iox.Path.new(str(scratch))
    config.global_cfg.prefix = iox.FileName.new(_prefix(scratch))
    iox.set_log_level(iox.LogLevel.Error)
    return iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)


def _prefix(scratch: Path) -> str:
    return f"{scratch.parent.name}-"


def _service(node: Any, name: str, case: Case) -> Any:
    samples = case.n * case.items  # as many are on their way at once
    service = node.service_builder(iox.ServiceName.new(name)).publish_subscribe(iox.Slice[ctypes.c_uint8])
    return (
        service.payload_alignment(iox.Alignment.new(_ALIGNMENT))
        .max_publishers(1)
        .max_subscribers(case.readers)
        .max_nodes(case.readers + 1)
        .subscriber_max_buffer_size(samples)
        .subscriber_max_borrowed_samples(samples)
        .history_size(0)
        .enable_safe_overflow(False)
        .open_or_create()
    )


def _over(address: int, dtype: torch.dtype, nbytes: int) -> Tensor:
    """A tensor over memory that iceoryx owns."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=dtype)
