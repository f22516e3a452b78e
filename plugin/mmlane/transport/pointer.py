"""The object that stands in a feature's place, under the name by which the engine and its codec know it.

One class on every release. What it carries, its payload, says how the feature travels; the class itself only
follows the engine's rules: it can be made without arguments, by the codec and by pickle; made of a tensor it may
be that tensor itself, since the engine waits for its ranks wherever it sees a pointer; its state is flat, of
builtins, and without a kind where it is a segment, as the engine's own pointers are and those of its Rust server;
and it never raises while it is unpickled, in the middle of a collective. From rank to rank, over several nodes, it
has such a state for each node.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from mmlane.log import guarded
from mmlane.transport.base import Controller, Here, LostFeature, Payload
from mmlane.transport.chain import KIND, Chain, Unreadable
from mmlane.transport.inline import Inline

if TYPE_CHECKING:
    from mmlane.transport.scheduler_side import SchedulerSide
    from mmlane.transport.tokenizer_side import Sending


@dataclass
class Slot:
    """What this process is: all that decides what a pointer is here, besides the pointer's own state.

    chain: by which pointers are read that arrive here, and which is offered a tensor while no request is sent:
    that of the rank or controller that this process is, else one without a lane, which passes pointers on.
    scheduler: the scheduler side, if this process is a rank. scope: the request that is being sent, or of which
    the engine makes samples, if any. pointers: the class below. `is_pointer` goes by this and not by the class's
    name: another plugin may replace the class by the engine's hooks, which do so in all modules, ours too.
    """

    chain: Chain = field(default_factory=lambda: Chain(Here()))
    scheduler: SchedulerSide | None = None
    scope: ContextVar[Sending | None] = field(default_factory=lambda: ContextVar("scope", default=None))
    pointers: type[ShmPointerMMData] = field(init=False)


slot = Slot()


@dataclass(frozen=True)
class Sealed:
    """An invitation as it travels, perhaps one of another version of mmlane. `repr` hides the secret in it."""

    data: bytes = field(repr=False)


class ShmPointerMMData:
    """A payload, and what the engine asks of a pointer: the feature's `shape`, `dtype` and `precomputed_hash`."""

    __module__ = "sglang.srt.managers.mm_utils"

    payload: Payload = Unreadable(ValueError("a pointer that was never filled"), {})
    invitation: Sealed | None = None  # to a lane that readers still have to join
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8
    precomputed_hash: int | None = None
    by_node: dict[str, dict[str, Any]] | None = None  # what it is on each node, where ranks are on several
    lost: str = ""  # why no rank can take it, as the process has found that sent it on to all

    def __new__(cls, tensor: torch.Tensor | None = None, precomputed_hash: int | None = None) -> Any:
        """Send a tensor on its way: a pointer, or the tensor where it is to be sent inside its request.

        Without a tensor: a pointer to be filled by `__setstate__`.
        """
        if tensor is None:
            return super().__new__(cls)
        return cls.of(tensor, *(slot.scope.get() or slot.chain).offer(tensor), precomputed_hash)

    @classmethod
    def of(
        cls, tensor: torch.Tensor, payload: Payload, invitation: bytes | None, precomputed_hash: int | None
    ) -> ShmPointerMMData | torch.Tensor:
        """What stands in a tensor's place: a pointer, or the tensor itself where nothing else has to travel."""
        if isinstance(payload, Inline) and invitation is None:
            return payload.tensor
        pointer: ShmPointerMMData = object.__new__(cls)
        pointer.payload = payload
        pointer.shape, pointer.dtype, pointer.precomputed_hash = tensor.shape, tensor.dtype, precomputed_hash
        if invitation is not None:
            pointer.invitation = Sealed(invitation)
        return pointer

    def __copy__(self) -> ShmPointerMMData:
        """The same pointer: a feature is taken once, and a second object would release it when dropped."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ShmPointerMMData:
        return self

    def __getstate__(self) -> dict[str, Any]:
        form: dict[str, Any] = {"shape": self.shape, "dtype": self.dtype}
        own = {"precomputed_hash": self.precomputed_hash, **({"lost": self.lost} if self.lost else {})}
        if self.by_node is not None:
            return {**form, **own, "by_node": self.by_node}
        state = {**form, **self.payload.state(), **own}
        if self.payload.kind:
            state.setdefault(KIND, self.payload.kind)
        if self.invitation is not None:
            state["invitation"] = self.invitation.data
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Never raises: what cannot be read is told when the feature is taken."""
        kept: dict[str, Any] = {}
        invitation = route = None
        try:
            kept = dict(state)
            self.lost = kept.pop("lost", "")
            self.by_node = kept.pop("by_node", None)  # for ranks that this one passes it on to
            kept.update((self.by_node or {}).get(slot.chain.here.node, {}))
            route = kept.pop("route", None)
            invitation = kept.pop("invitation", None)
            self.shape, self.dtype = kept.get("shape", ()), kept.get("dtype", torch.uint8)
            self.precomputed_hash = kept.get("precomputed_hash")
            self.payload = slot.chain.receive(kept)
        except Exception as error:  # noqa: BLE001 - kept for `take`, which raises it
            self.payload = Unreadable(error, kept)
        if isinstance(invitation, bytes):
            self.invitation = Sealed(invitation)  # for those that this process passes it on to
        if invitation is not None:
            with guarded("join", "this rank is sent features by shared-memory segments"):
                slot.chain.join(invitation)
        if route is not None and slot.scheduler is not None:
            with guarded("nodes", "this node is sent features inside of their requests, to each rank"):
                slot.scheduler.land(route)

    @property
    def tensor(self) -> torch.Tensor | None:
        """The feature without taking it, or None where it cannot be read."""
        return self.payload.peek()

    def materialize(self) -> torch.Tensor:
        """Take the feature: a tensor on the CPU. Raises `LostFeature`, or what the payload's class says."""
        if self.lost:
            raise LostFeature(self.lost)
        return self.payload.take()

    def close_and_unlink(self) -> None:
        """Let go of the feature without taking it. Never raises."""
        self.payload.release()


slot.pointers = ShmPointerMMData


def is_pointer(value: Any) -> TypeGuard[ShmPointerMMData]:
    """Whether it is one of ours."""
    return isinstance(value, slot.pointers)


def our_class_is_in_place() -> bool:
    """Whether the engine's name means `slot.pointers`: else they cannot be pickled, and others are made."""
    return vars(sys.modules[slot.pointers.__module__]).get("ShmPointerMMData") is slot.pointers


def with_own_segments(engines_own: type) -> type:
    """Take the place of the engine's class, and carry segments ourselves: its own have faults."""
    return _installed(Here())


def with_engine_segments(engines_own: type) -> type:
    """Take the place of the engine's class, and have it carry the segments: it has all fixes."""
    return _installed(Here(engine_class=engines_own))


def _installed(here: Here) -> type:
    # Else this is done again, and the rank or controller has its lane.
    if slot.scheduler is None and not isinstance(slot.chain.here, Controller):
        slot.chain = Chain(here)
    return slot.pointers
