"""What a way of moving tensors has to offer to be measured. Every way has one module with these two classes.

The producing process makes a `Producer` and forks the readers, each of which makes a `Reader`: whatever they
import is imported once. Then, for each case: `Producer.open`, `Reader.open` in all readers at once,
`Producer.ready`; rounds; `Reader.close`, `Producer.close`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmlane.bench.case import Case


class Producer(ABC):
    """`scratch` is a directory of this way's own, removed after the run; `mode` as in the way."""

    def __init__(self, scratch: Path, mode: str | None) -> None:
        self.scratch = scratch
        self.mode = mode

    @abstractmethod
    def open(self, case: Case) -> str:
        """Get ready for `case.readers` readers; return what they need to find it."""

    def ready(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Called when every reader has opened its end."""

    @abstractmethod
    def put(self, tensors: Sequence[Tensor]) -> Sequence[bytes]:
        """Make the tensors available to all readers; one message for each of them. Raises Refusal."""

    def is_settled(self) -> bool:
        """Whether it goes as it is to be measured: some ways need messages to open. Raises Refusal."""
        return True

    def free(self) -> None:  # noqa: B027 - most keep nothing
        """Free what the puts since the last call still hold; every reader has freed its part."""

    @abstractmethod
    def close(self) -> None:
        """Undo `open`, so that another case can follow."""


class Reader(ABC):
    """The other end, as above. `device`: where tensors are copied to, once taken; measured is when they are there,
    instead of when they have been read on the CPU."""

    device: str | None = None

    def __init__(self, scratch: Path, mode: str | None) -> None:
        self.scratch = scratch
        self.mode = mode

    @abstractmethod
    def open(self, address: str, rank: int, case: Case) -> None:
        """Connect to the producer as number `rank` of `case.readers`."""

    @abstractmethod
    def take(self, message: bytes) -> Sequence[Tensor]:
        """The tensors of one message, readable."""

    def free(self) -> None:  # noqa: B027
        """Give back what was taken; the tensors are gone already."""

    @abstractmethod
    def close(self) -> None:
        """Undo `open`."""
