"""The lane's end in a rank, or in the controller of replicas: it joins lanes, and takes tickets."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from math import inf

import torch

from mmlane.lane import Invitation, LaneError, Mode, Reader, StaleHere, UnknownLane
from mmlane.lane.ticket import read
from mmlane.log import failed
from mmlane.transport.base import Controller, Receiver

KEPT = 0.25  # of a lane, held by a rank; beyond that it copies what the engine keeps until a request has ended
RETRY_S = 10.0  # before a rank tries again to join a lane that it could not join


class Rank:
    """A rank, or the controller of replicas, as a reader: joins the lanes that invite it, and takes tickets.

    passes_on: whether it is the controller, which leaves to the ranks what it does not take.
    """

    def __init__(self, here: Receiver) -> None:
        self._here = here
        self.passes_on = isinstance(here, Controller)
        self._mode: Mode | None = "cow" if here.writable else None
        self._pid = os.getpid()
        self._reader: Reader | None = None
        self._making = threading.Lock()
        self._next_try: dict[str, float] = {}  # a lane's name -> when joining may be tried again
        self._joined: set[str] = set()

    def notice(self, invitation: Invitation) -> None:
        """Join a lane, in the background; at once done for one that is joined. Never raises."""
        name = invitation.name
        if self._here.number is None or self._next_try.get(name, 0.0) > time.monotonic():
            return
        if self._reader is not None and name in self._reader.lanes():
            return
        self._next_try[name] = inf
        try:
            threading.Thread(target=self._join, args=(invitation,), name="mmlane-joining", daemon=True).start()
        except Exception as error:  # noqa: BLE001 - this may be in the middle of a collective
            self._not_joined(name, error)

    def _join(self, invitation: Invitation) -> None:
        here = self._here
        assert here.number is not None
        try:
            with self._making:
                if self._reader is None:
                    self._reader = Reader(here.group, here.number, device=here.device)
            self._reader.join(invitation)
            self._joined.add(invitation.name)
            self._next_try[invitation.name] = 0.0  # should the connection be lost before the lane opens
        except Exception as error:  # noqa: BLE001 - whatever it is, this rank is served by segments
            self._not_joined(invitation.name, error)

    def _not_joined(self, name: str, error: Exception) -> None:
        failed(
            "join",
            error,
            f"this reader ({self._here.number} of {self._here.group}) is sent features by shared-memory segments,"
            " and tries again; MMLANE=backport silences this",
        )
        self._next_try[name] = time.monotonic() + RETRY_S

    def take(self, ticket: bytes) -> torch.Tensor:
        """The feature of a ticket, on the CPU; writable unless it is to go to a GPU. Raises `TicketError`.

        `StaleHere` is what only this rank may have: it has heard of the lane, as all have, and not joined it.
        """
        try:
            if self._reader is None:
                raise UnknownLane("this rank has joined no lane")
            return self._reader.take(ticket, self._mode)
        except UnknownLane as error:
            name = read(ticket).lane
            if name in self._next_try and name not in self._joined:
                raise StaleHere(f"a ticket came before this rank had joined lane {name}") from error
            raise

    def holds_little(self, ticket: bytes) -> bool:
        """Whether there is room enough in a ticket's lane for this rank to keep the tensor as long as it likes."""
        with suppress(LaneError):  # it has ended: its room is not needed
            if self._reader is not None:
                return self._reader.held_share(read(ticket).lane) <= KEPT
        return True

    def release(self, ticket: bytes, *, sent: bool = False) -> None:
        """Release a ticket untaken. For finalizers, too."""
        if self._reader is not None and os.getpid() == self._pid:
            with suppress(LaneError):  # stale or of a lane that is gone: nothing to give back
                self._reader.discard(ticket)
