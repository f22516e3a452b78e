"""The reading side of a lane: join it, take tensors out of it without a copy, release them when they die."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch

from mmlane.lane import arguments, failpoints
from mmlane.lane.bookkeeping import Member
from mmlane.lane.device import Device
from mmlane.lane.errors import JoinRefused, LaneUnavailable, UnknownLane
from mmlane.lane.invitation import Invitation
from mmlane.lane.joining import in_a_thread, open_link
from mmlane.lane.link import Claim, Link
from mmlane.lane.listening import Listener
from mmlane.lane.mapping import PAGE, Mapping, round_up, tensor_at
from mmlane.lane.protocol import ProtocolError

Mode = Literal["view", "cow", "clone"]
_MODES = get_args(Mode)


class Reader:
    """One process's reading end, for any number of lanes. Thread-safe. Not usable in a forked child.

    Args:
        group: which of the lanes' groups this process belongs to.
        number: its place there, from 0 on; like the rank of a tensor-parallel process.
        device: the CUDA device that tensors are copied to from here, as torch names it ("cuda:0"). Then what a
            lane keeps for that (`Lane(pinned=...)`) is registered as pinned memory in the background, and a
            ticket is released when its tensor is let go *and* the device has done what it was told before that, on
            streams that were made current through torch.cuda.
        linger: seconds for which tickets of a lane can still be taken after its producer has ended; longer than
            any rank of an engine stands still: one that comes later would refuse what its peers took.

    Raises ValueError for a number below 0 and for a device that is not CUDA's or not there, TypeError for an
    argument of another type, LaneUnavailable where no reader can be had.
    """

    def __init__(
        self, group: str, number: int = 0, *, device: torch.device | str | None = None, linger: float = 300.0
    ) -> None:
        if not isinstance(group, str):
            raise arguments.wrong("group", group, 'the name of a group, then the number: Reader("tp", 0)')
        number = arguments.whole("number", number, least=0, example='0 in Reader("tp", 0)')
        linger = arguments.seconds("linger", linger)
        where = None if device is None else torch.device(device)
        if where is not None and (where.type != "cuda" or where.index is None):
            raise ValueError(f"device {device!r}: one like cuda:0, or None for a reader that stays on the CPU")
        self.group = group
        self.number = number
        self._joining = threading.Lock()
        try:
            self._listener = Listener(linger)
            self._device = None if where is None else Device(where.index)
            self._listener.start(f"mmlane-reader-{group}-{number}", self._device)
        except (OSError, RuntimeError) as error:
            raise LaneUnavailable(
                f"no reader can be had ({error}): raise `ulimit -n` or `ulimit -u`, or allow in the sandbox"
                " what is named here"
            ) from error

    def join(self, invitation: Invitation, timeout: float = 10.0) -> None:
        """Join a lane, and map its memory; at once when it is joined already.

        Waits up to `timeout` seconds for the lane's producer. From the return of this on the producer counts on
        this reader, until it ends or is closed. Raises JoinRefused with the reason, TypeError for what is no
        Invitation.
        """
        self._join(invitation, timeout, threading.Event())

    async def join_async(self, invitation: Invitation, timeout: float = 10.0) -> None:
        """As `join`, for a task: the event loop goes on, a thread waits.

        Cancelled, it gives up: the lane is not joined, unless that had just been done.
        """
        await in_a_thread(partial(self._join, invitation, timeout), f"mmlane-joining-{self.group}-{self.number}")

    def _join(self, invitation: Invitation, timeout: float, given_up: threading.Event) -> None:
        if not isinstance(invitation, Invitation):
            wanted = "an Invitation: lane.invitation, or Invitation.parse(data) of its bytes"
            raise arguments.wrong("invitation", invitation, wanted, quoted=False)
        listener = self._listener
        with self._joining:
            listener.check()
            name = invitation.name
            if listener.has_failed:
                raise JoinRefused(f"lane {name} could not be joined: this reader's thread has failed")
            try:
                link = listener.links.get(name)
                if link is None or link.gone_at is not None:
                    link = open_link(
                        invitation, Member(self.group, self.number), timeout, listener.wake, self._device
                    )
                    if given_up.is_set():
                        link.leave()
                        raise ProtocolError("it was given up")
                    listener.links[name] = link  # tickets may come as soon as the producer hears of the mapping
                failpoints.reached("join.stored")
                listener.hear(link)
                link.enter()
                failpoints.reached("join.acknowledged")
                listener.check_open()
            except (OSError, ValueError, ProtocolError) as error:
                listener.check_open()
                reason = str(error)
                if isinstance(error, TimeoutError):
                    reason = f"no answer within {timeout:g} s"
                elif isinstance(error, ConnectionError):
                    reason = "it hung up: too many wait there, or it has just ended"
                raise JoinRefused(f"lane {name} could not be joined: {reason}") from error

    def take(self, ticket: bytes, mode: Mode | None = None) -> torch.Tensor:
        """The tensor of a ticket, contiguous, on the CPU. A ticket can be taken once by each reader.

        mode: `view` is the producer's own bytes, without a copy: it must not be written to, or the process ends
        with SIGSEGV. `cow` can be written to: a page that is written is copied first. `clone` is a copy. By
        default `view` for a reader with a device, which only reads to copy them there, else `cow`.

        The ticket is released when the last alias of the tensor's storage dies (slices, numpy arrays and dlpack
        exports count), for a clone at once; with a device, when it has also done its work on what was let go. It
        is also released if this call is interrupted.

        Raises MalformedTicket, StaleTicket, UnknownLane, ValueError for an unknown mode, and LaneError in a reader
        that is closed and in a forked child.
        """
        if mode is None:
            mode = "cow" if self._device is None else "view"
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(_MODES)}")
        link, content = self._listener.find(ticket)
        claim = link.claim(ticket, content)
        failpoints.reached("take.claimed")
        tensor = self._tensor(link, claim, mode)
        failpoints.reached("take.mapped")
        return tensor

    def discard(self, ticket: bytes) -> None:
        """Release a ticket untaken, soon: the reader's thread does it. No-op for one that is not out.

        Can be called wherever Python runs, finalizers included. Raises as `take` does.
        """
        self._listener.find(ticket)
        self._listener.discarded.append(ticket)
        self._listener.wake()

    def held_share(self, name: str) -> float:
        """Which part of a joined lane's memory this reader holds, from 0 on. Raises UnknownLane.

        Bytes that several tickets share count for each of them.
        """
        link = self._listener.links.get(name)
        if link is None:
            raise UnknownLane(f"lane {name} is not joined")
        return link.held_share()

    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes that are joined and alive."""
        return tuple(name for name, link in list(self._listener.links.items()) if link.gone_at is None)

    def wait_pinned(self, name: str, timeout: float | None = None) -> bool:
        """Wait until a joined lane's memory is registered with CUDA; False if that failed, or after `timeout` s.

        Nothing else waits for it: until then, tensors are copied from pageable memory. Raises UnknownLane.
        """
        link = self._listener.links.get(name)
        if link is None:
            raise UnknownLane(f"lane {name} is not joined")
        return link.pinning.wait(timeout) and link.pinned is not None

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave all lanes, which ends them if they were open. Tensors that are held stay valid.

        Does nothing in a forked child, and nothing while Python itself ends (see `Lane.close`).
        """
        if not _ending() and os.getpid() == self._listener.pid:
            self._listener.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()  # which waits for nothing

    def _tensor(self, link: Link, claim: Claim, mode: Mode) -> torch.Tensor:
        where, nbytes = link.base + claim.content.offset, claim.content.nbytes
        pinned = link.pinned
        if mode == "view" and pinned is not None and pinned.holds(where, nbytes):
            claim.mapping, where = pinned, where - pinned.offset
        if mode == "cow" and nbytes:
            begin = where - where % PAGE
            try:
                claim.mapping = Mapping(
                    link.descriptor.fd, round_up(where + nbytes - begin), offset=begin, private=True
                )
                where -= begin
            except OSError as error:  # too many mappings, or strict overcommit: a copy does as well
                if error.errno is None:  # a TimeoutError of a signal handler
                    raise
                self._listener.clones.append(f"no private mapping of {nbytes} bytes ({error}): cloned")
                mode = "clone"
        owner = claim.mapping.owner(where, keeps=claim)
        tensor = tensor_at(owner, claim.content.dtype, claim.content.shape)
        if mode == "clone":
            return tensor.clone()
        if self._device is not None:
            assert claim.watch is not None
            claim.watch.is_lent = True
            self._device.owe(claim.watch)
        return tensor
