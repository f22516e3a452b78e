"""What all transports have in common: a transport makes payloads, and a payload stands for one feature.

A new transport is one file with a `Transport` and its `Payload`, and one entry in `chain.CHAIN`; CONTRIBUTING.md
has the steps.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mmlane.lane import Lane
from mmlane.transport.samples import Samples


class LostFeature(RuntimeError):
    """A feature cannot be taken, for a reason that every rank has: its request fails, on all of them."""


class Ownership(enum.Enum):
    """Which process has to release a payload's memory, as the process sees it that holds the payload."""

    OURS = enum.auto()  # made here, or arrived here to be taken or passed on: dropping it releases it
    SENT = enum.auto()  # pickled: up to the receivers, unless the request could not be sent after all
    DONE = enum.auto()  # taken or released; also a ticket in a process that only passes it on


@dataclass(frozen=True)
class Declined:
    """A transport's answer to a tensor that it does not carry; the next one in the chain is asked.

    cause: a word for it, such as "full". invitation: what ranks have to be sent so that this transport can carry
    later tensors; the pointer of this one brings it.
    """

    cause: str
    invitation: bytes | None = field(default=None, repr=False)  # it holds the lane's secret


class Payload(ABC):
    """What a pointer carries for one feature.

    kind: the word in the pointer's state that tells its receivers which transport it is of; "" for a segment. No
    two transports that read their payloads differently have the same.
    needs_agreement: whether one rank alone may be unable to take it. Then all ranks that received it agree before
    one takes it: up to 0.5.18 we ask each for `prepare`, and `take` succeeds after that; from 0.5.19 on the engine
    waits for all ranks, calls `take`, and refuses the request on all of them if it raised on any. Without it, each
    rank takes alone, and `take` has to come to the same end on all.
    lends: whether `take` gives memory that others wait for. It has to come back soon, so where the engine keeps a
    tensor for long, a copy stands in its place.

    A payload that holds memory keeps its `Ownership`, and releases the memory when it is dropped while it is OURS.
    """

    kind: ClassVar[str]
    needs_agreement: ClassVar[bool] = False
    lends: ClassVar[bool] = False
    what: ClassVar[str] = "the feature"  # for people: what cannot be read when it is lost
    advice: ClassVar[str] = ""  # and what they can do
    name: str = ""  # by which people find it

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What travels: flat, of builtins, tensors, dtypes and shapes; called whenever the pointer is pickled.

        These keys are the pointer's own: "shape", "dtype", "precomputed_hash", "payload" (the kind), "invitation",
        "lost", "by_node", "route".
        """

    @abstractmethod
    def take(self) -> torch.Tensor:
        """The feature on the CPU, in its shape and dtype. Raises `LostFeature`.

        Without `needs_agreement`, any other error ends the rank: its peers may have taken the feature.
        """

    def release(self) -> None:  # noqa: B027 - what has no memory has nothing to release
        """Release the feature's memory untaken, whether it was pickled or not. Never raises; once is enough."""

    def may_be_kept(self) -> bool:
        """Whether what `take` has lent may be held until the request has ended; else a copy is held instead."""
        return True

    def prepare(self) -> str | None:
        """Make sure that `take` will succeed: None, or why it will not. Never raises."""
        return None

    def peek(self) -> torch.Tensor | None:
        """The feature without taking it, or None where it cannot be read."""
        return None


def lost_message(payloads: Sequence[Payload], cause: str) -> str:
    """What to say of a request of which not all payloads can be read: which, what follows, what to do."""
    names = ", ".join(payload.name for payload in payloads if payload.name)
    what, advice = payloads[0].what, payloads[0].advice
    return (
        f"multimodal features are lost: {what}{' ' * bool(names)}{names} cannot be read ({cause}). Only this"
        f" request fails; send it again{advice}"
    )


@dataclass(frozen=True)
class Here:
    """What transports are told of the process that they are made in. Of this class itself: one without a lane.

    engine_class: the engine's own pointer class, where segments are left to it. node: this process's, in a rank
    whose peers are on several nodes.
    """

    engine_class: type[Any] | None = field(default=None, kw_only=True)
    node: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Tokenizer(Here):
    """A tokenizer of a launch that has a lane.

    readers: reader group -> number of readers. capacity: bytes of the lane, None for its default. pinned: bytes of
    it that ranks on CUDA register. watch: told of the lane once it is made, for the engine's /metrics.
    """

    readers: Mapping[str, int]
    capacity: int | None = None
    pinned: int = 0
    watch: Callable[[Lane], None] | None = None


@dataclass(frozen=True)
class Receiver(Here):
    """A process of a launch that has a lane, which joins it and takes features from it.

    group, number: its place among the lane's readers; number None if no pointers are sent to it. device: the CUDA
    device that it copies features to, if any. writable: whether features can be written to all the same, at the
    price of a private mapping, which cannot be pinned; on a CPU they always can.
    """

    group: str
    number: int | None
    device: torch.device | None = None
    writable: bool = False


@dataclass(frozen=True)
class Scheduler(Receiver):
    """A rank, with a number among those of its node that receive the same requests; None in a later stage."""


@dataclass(frozen=True)
class Controller(Receiver):
    """The controller of replicas: passes pointers on, and takes those for replicas on other nodes."""


class Transport(ABC):
    """One way for features. Every process of the engine makes one for each of its chains: that must not raise.

    where: the word by which its failures are counted (`log.failed`). consequence: what follows from one.
    """

    payload: ClassVar[type[Payload]]
    where: ClassVar[str]
    consequence: ClassVar[str]

    @abstractmethod
    def __init__(self, here: Here) -> None: ...

    @abstractmethod
    def offer(self, tensor: torch.Tensor, samples: Samples | None = None) -> Payload | Declined:
        """Carry a CPU tensor of any shape, dtype, layout and strides; what is needed of it is copied here and now.

        Called in the tokenizer's event loop: it must not wait. What it raises counts as declined, and
        must leave nothing behind. samples: the requests that share the tensor, with n > 1; may be ignored.
        """

    @abstractmethod
    def receive(self, state: Mapping[str, Any]) -> Payload:
        """The payload that a pointer brought, from its state; also in a process that only passes it on.

        A rank may be in a collective with its peers: raise only for a state that is wrong, which it is on all of
        them. An error that this rank alone may have is kept, for `Payload.prepare` to return.
        """

    def join(self, invitation: bytes) -> None:  # noqa: B027 - most transports invite no process
        """An invitation has arrived in this process. One transport of a chain invites."""
