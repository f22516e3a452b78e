"""The ways of a feature, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmlane.log import failed
from mmlane.transport.base import Declined, Here, LostFeature, Payload, Transport, lost_message
from mmlane.transport.inline import Inline, InlineTransport, SmallInlineTransport
from mmlane.transport.lane import LaneTransport
from mmlane.transport.leader_copy import LeaderCopyTransport
from mmlane.transport.samples import Samples
from mmlane.transport.segment import SegmentTransport

# Asked in this order: the first that does not decline carries the tensor. What arrives is read by the one whose
# payload has its kind (of the two inline transports, either can).
CHAIN: tuple[type[Transport], ...] = (
    SmallInlineTransport,
    LaneTransport,
    SegmentTransport,
    LeaderCopyTransport,
    InlineTransport,
)

KIND = "payload"  # where a pointer's state has the kind of its payload


class Unreadable(Payload):
    """What has arrived and cannot be read. What is wrong with its state is the same on all ranks."""

    kind = ""  # it is passed on unchanged

    def __init__(self, error: Exception, state: Mapping[str, Any]) -> None:
        # No error is kept as an object: its frames hold the invitation.
        self._is_malformed = isinstance(error, AttributeError | LookupError | TypeError | ValueError)
        self._cause = f"{type(error).__name__}: {error}"
        self._state = dict(state)

    def state(self) -> dict[str, Any]:
        return self._state

    def take(self) -> torch.Tensor:
        """Raises `LostFeature` for a wrong state, `RuntimeError` for an error that this rank may be alone with."""
        if not self._is_malformed:
            raise RuntimeError(f"a pointer could not be unpickled: {self._cause}")
        raise LostFeature(lost_message([self], self._cause))


class Chain:
    """The transports of one side, or of a process that is none."""

    def __init__(self, here: Here) -> None:
        self.here = here
        self.transports = [transport(here) for transport in CHAIN]
        self._by_kind = {transport.payload.kind: transport for transport in self.transports}

    def offer(
        self, tensor: torch.Tensor, samples: Samples | None = None, *, ranks_agree: bool = True
    ) -> tuple[Payload, bytes | None]:
        """What carries a tensor, and the invitation to send along, if any. Never raises.

        ranks_agree: whether ranks will agree on payloads that need it. Else the transports of those are not asked.
        """
        invitation = None
        for transport in self.transports:
            if transport.payload.needs_agreement and not ranks_agree:
                continue
            try:
                answer = transport.offer(tensor, samples)
            except Exception as error:  # noqa: BLE001 - the feature goes the next way
                failed(transport.where, error, transport.consequence)
                continue
            if not isinstance(answer, Declined):
                return answer, invitation
            invitation = answer.invitation or invitation
        return Inline(tensor), invitation

    def receive(self, state: Mapping[str, Any]) -> Payload:
        """The payload in a pointer's state.

        Raises `ValueError` for a kind that is not in the chain, and what its transport raises.
        """
        transport = self._by_kind.get(state.get(KIND, ""))
        if transport is None:
            raise ValueError(f"they travel by {state[KIND]!r}, which this mmlane does not know")
        return transport.receive(state)

    def join(self, invitation: bytes) -> None:
        """An invitation has arrived. Raises `MalformedInvitation`."""
        for transport in self.transports:
            transport.join(invitation)

    def find(self, kind: type[Transport]) -> Transport:
        """This side's transport of a class."""
        return next(transport for transport in self.transports if type(transport) is kind)
