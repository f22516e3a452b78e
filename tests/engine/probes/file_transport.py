"""A transport that a test adds: each tensor in a file of its own, which the first rank that takes it removes.

As in CONTRIBUTING.md, "Add a transport": this file, and one entry in the chain.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mmlane.transport.base import Declined, Here, LostFeature, Ownership, Payload, Transport
from mmlane.transport.samples import Samples


class File(Payload):
    """A file with a tensor's bytes. Ranks open it when it arrives, and agree on that before one takes it."""

    kind = "file"
    needs_agreement = True
    what = "the file"

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name = str(path)
        self._path, self._shape, self._dtype = path, shape, dtype
        self._data: bytes | None = None
        self._error: str | None = None
        self._ownership = Ownership.OURS

    def state(self) -> dict[str, Any]:
        self._ownership = Ownership.SENT
        return {"file": str(self._path)}

    def open(self) -> File:
        try:
            self._data = self._path.read_bytes()
        except OSError as error:
            self._error = str(error)
        return self

    def prepare(self) -> str | None:
        return self._error

    def take(self) -> torch.Tensor:
        self.release()
        if self._data is None:
            raise LostFeature(f"{self.name} is lost: {self._error}")
        return torch.frombuffer(bytearray(self._data), dtype=torch.uint8).view(self._dtype).reshape(self._shape)

    def release(self) -> None:
        self._ownership = Ownership.DONE
        with suppress(FileNotFoundError):
            self._path.unlink()

    def __del__(self) -> None:
        if self._ownership is Ownership.OURS:
            self.release()


class FileTransport(Transport):
    """Carries every tensor by way of the directory $NOTES, while there is a file `by_file` in it."""

    payload = File
    where = "file"
    consequence = "the feature goes another way"

    def __init__(self, here: Here) -> None:
        self._directory = Path(os.environ["NOTES"])

    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> File | Declined:
        if not (self._directory / "by_file").exists():
            return Declined("not now")
        path = self._directory / f"{secrets.token_hex(8)}.feature"
        path.write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        with (self._directory / "sent_by_file").open("a") as said:
            said.write(f"{path}\n")
        return File(path, tensor.shape, tensor.dtype)

    def receive(self, state: Mapping[str, Any]) -> File:
        return File(Path(state["file"]), state["shape"], state["dtype"]).open()
