"""The engine's own transport, from its own functions. Runs in an engine's environment, on any release since 0.5.9.

Sending is what its tokenizer does for a request: `wrap_shm_features`, then the coding it uses on its sockets. For
`n` samples that happens `n` times. Receiving is the engine's own `recv_requests`, whole, in one process a rank:
rank 0 takes the request from a socket, the others get it over gloo, and whatever that release does to agree and to
turn pointers into tensors happens in there. The engine polls for requests; here it is called when there is one.

With one reader there is no broadcast and no barrier, as with `--tp 1`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmlane.bench import contract
from mmlane.bench.case import Case
from mmlane.engine.requests import items
from mmlane.engine.standalone import Socket, as_tokenizer, receiver_for, request_with, send

_TIMEOUT = timedelta(seconds=120)


class Producer(contract.Producer):
    """A tokenizer's part."""

    def __init__(self, scratch: Path, mode: str | None) -> None:
        super().__init__(scratch, mode)
        self._rounds = itertools.count()
        self._socket = Socket()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        as_tokenizer()

    def open(self, case: Case) -> str:
        self._readers = case.readers
        return str(self.scratch / f"gloo-{next(self._rounds)}")

    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        self._send(request_with(tensors))
        # The message itself is for rank 0; the others take its arrival as their turn to poll.
        return [self._socket.recv()] * self._readers

    def _send(self, request: Any) -> None:
        send(request, self._socket)

    def close(self) -> None:
        pass


class Reader(contract.Reader):
    """A scheduler's part, as one rank of as many as there are readers."""

    def open(self, address: str, rank: int, case: Case) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{address}", rank=rank, world_size=case.readers, timeout=_TIMEOUT
        )
        self._rank = rank
        self._socket = Socket()
        self._receiver = receiver_for(rank, case.readers, self._socket)

    def take(self, message: bytes) -> Sequence[Tensor]:
        if self._rank == 0:
            self._socket.send(message)
        (request,) = self._receiver.recv_requests()
        return [item.feature for item in items(request)]

    def close(self) -> None:
        dist.destroy_process_group()
