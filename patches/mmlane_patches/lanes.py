"""This process's end of the lanes: a tokenizer's `Producer`, a scheduler's `Rank`, and who is expected where.

Neither does anything before the first large feature: an engine that serves text only has no lane.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any

import torch

from mmlane.lane import (
    Invitation,
    Lane,
    LaneError,
    LaneUnavailable,
    Mode,
    Reader,
    Refused,
    Reservation,
    StaleHere,
    UnknownLane,
    memory,
)
from mmlane.lane.cuda import watch_streams
from mmlane.lane.ticket import read
from mmlane.settings import PINNED
from mmlane_patches.guard import failed, guarded

if TYPE_CHECKING:
    from mmlane_patches.metrics import State

logger = logging.getLogger("mmlane")

INLINE = 64 << 10  # bytes up to which a tensor travels inside its request, which is faster (docs/arena.md)
OPENING_S = 60.0  # after which a lane that has not opened is worth a line
RETRY_S = 10.0  # before a rank tries again to join a lane that it could not join

# By tokenizer manager: a process may have several engines, one after the other or at once.
producers: weakref.WeakKeyDictionary[Any, Producer] = weakref.WeakKeyDictionary()
# While a request is sent: its manager's.
producer: ContextVar[Producer | None] = ContextVar("producer", default=None)
# While a request with n > 1 is handled: its own.
samples: ContextVar[Samples | None] = ContextVar("samples", default=None)
rank: Rank | None = None

# How a lane is, in the words of the metrics.
_STATES: dict[str, State] = {"waiting": "opening", "open": "open", "off": "off", "closed": "failed"}


class Samples:
    """The requests that the engine makes of one with n > 1, all with the same tensors: what is in the lane once.

    requests: how many there will be with each tensor. A prompt's first request is answered before the others are
    sent, so the copy has to outlive that one's ticket. It does not live longer than the last of them is sent.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        # By the tensor's id, which it keeps from others, and what of it could be changed without copying: the
        # tensor, its copy, and how many requests are left.
        self._copies: dict[Any, tuple[torch.Tensor, Reservation, int]] = {}

    def put(self, lane: Lane, tensor: torch.Tensor) -> bytes | Refused:
        """A ticket on the one copy of a tensor."""
        same = id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        kept = self._copies.pop(same, None)
        copy = lane.copy(tensor) if kept is None else kept[1]
        if isinstance(copy, Refused):
            return copy
        left = self._requests if kept is None else kept[2]
        if left > 1:
            self._copies[same] = tensor, copy, left - 1
        return copy.publish()

    def close(self) -> None:
        """The request has ended, whether it sent all of them or not."""
        self._copies.clear()


class Producer:
    """The lane of a tokenizer; made with the first large feature, closed when the tokenizer is let go.

    readers: reader group -> number of ranks. capacity: bytes, or None for the lane's own default. pinned: bytes of
    it for ranks on CUDA to register. metrics: whether the engine has Prometheus metrics.
    """

    def __init__(
        self, readers: dict[str, int], capacity: int | None = None, *, pinned: int = 0, metrics: bool = False
    ) -> None:
        self._readers = readers
        self._capacity = capacity
        self._pinned = pinned
        self._metrics = metrics
        self._pid = os.getpid()
        self._lane: Lane | None = None
        self._tried = False
        self._failed = False
        self._warned: set[str] = set()

    def put(self, tensor: torch.Tensor) -> tuple[bytes | None, Invitation | None]:
        """A ticket for a tensor; or None, and the invitation that readers still have to get, if they have to.

        Never raises: whatever goes wrong, the feature goes another way.
        """
        try:
            return self._put(tensor)
        except Exception as error:  # noqa: BLE001 - as above
            failed("put", error, "the feature goes by a shared-memory segment")
            return None, None

    def _put(self, tensor: torch.Tensor) -> tuple[bytes | None, Invitation | None]:
        lane = self._lane if self._tried else self._open()
        if lane is None or os.getpid() != self._pid:
            return None, None
        together = samples.get()
        ticket = lane.put(tensor) if together is None else together.put(lane, tensor)
        if isinstance(ticket, bytes):
            return ticket, None
        if ticket.cause == "not_open":
            return None, lane.invitation
        self._warn(
            ticket.cause,
            f"the lane has no place for a feature ({ticket.cause}): {ticket.detail}. It goes by a shared-memory"
            " segment, as do others like it; said once per cause, `mmlane status` counts them",
        )
        return None, None

    def withdraw(self, ticket: bytes) -> None:
        """A ticket that was never sent is void. Can be called from finalizers."""
        if self._lane is not None and os.getpid() == self._pid:
            self._lane.withdraw(ticket)

    def recall(self, ticket: bytes) -> None:
        """A ticket has been written into a message that was not sent, as far as is known."""
        if self._lane is not None and os.getpid() == self._pid:
            self._lane.recall(ticket)

    @property
    def lane(self) -> Lane | None:
        """The lane, when there is one in this process."""
        return self._lane if os.getpid() == self._pid else None

    def _open(self) -> Lane | None:
        self._tried = True
        try:
            self._lane = Lane(self._readers, capacity=self._capacity, pinned=self._pinned)
        except LaneUnavailable as error:
            self._do_without(error)
            return None
        finally:
            self._failed = self._lane is None
        # In a thread: the garbage collector may run this where the lane's lock is held.
        weakref.finalize(self, _in_a_thread, self._lane.close).atexit = False
        _in_a_thread(_see_it_open, self._lane, self._metrics)
        return self._lane

    def try_out(self) -> None:
        """Say now whether there can be a lane here, instead of at the first large feature. Leaves nothing."""
        try:
            memory.attempt(self._capacity or memory.default_capacity())
        except LaneUnavailable as error:
            self._do_without(error)

    @property
    def state(self) -> State:
        """How the lane is."""
        if self._failed:
            return "failed"
        if self._lane is None:
            return "unused"
        return _STATES[self._lane.state]

    def _do_without(self, error: LaneUnavailable) -> None:
        self._tried = self._failed = True
        size = "unset" if self._capacity is None else self._capacity >> 20
        self._warn(
            "unavailable",
            f"no lane here: {error}. Features go by shared-memory segments instead; MMLANE_CAPACITY_MB"
            f" (here {size}) sets the size, MMLANE=backport silences this",
        )

    def _warn(self, cause: str, line: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            logger.warning("mmlane: %s", line)


def _in_a_thread(work: Callable[..., None], *args: Any) -> None:
    with suppress(RuntimeError):  # no thread to be had: a line is missing, or a lane stays until the process ends
        threading.Thread(target=work, args=args, name="mmlane-lane", daemon=True).start()


def _see_it_open(lane: Lane, metrics: bool) -> None:
    """Say when a lane opens, and once if that takes long. Holds no producer, so that one can go meanwhile."""
    with guarded("watching the lane", "nothing is said when it opens"):
        _watch(lane, metrics)


def _watch(lane: Lane, metrics: bool) -> None:
    if metrics:
        _measure(lane)
    ranks = " + ".join(str(count) for count in lane.expected.values())
    began = time.monotonic()
    late = False
    while not lane.wait_open(OPENING_S):
        if lane.is_closed:
            return
        if not late and lane.state != "off":
            late = True
            logger.warning(
                "mmlane: the lane has not opened within %.0f s, because not all of its %s ranks have joined it;"
                " features go by shared-memory segments until it does; `mmlane status` tells who is missing, the"
                " log of that rank why, and MMLANE=backport silences this",
                *(OPENING_S, ranks),
            )
    logger.info(
        "mmlane: the lane is open: %s ranks, %.1f GiB of room, %.1f s after the first feature",
        *(ranks, lane.stats().capacity_bytes / 2**30, time.monotonic() - began),
    )


def _measure(lane: Lane) -> None:
    with guarded("metrics", "the lane is not in /metrics"):
        from mmlane_patches import metrics

        metrics.watch(lane)


def _begin_metrics(manager: Any, state: Callable[[], State]) -> None:
    with guarded("metrics", "mmlane is not in /metrics"):
        from mmlane_patches import metrics  # which imports what looks for PROMETHEUS_MULTIPROC_DIR: set by now

        metrics.begin(manager, state)


class Rank:
    """A scheduler process as a reader: joins the lanes that invite it, and takes tickets.

    group, number: its place among the ranks that receive the same requests; None for a later pipeline stage, which
    receives no tickets. device: the CUDA device that it copies features to, if any. writable: whether features can
    be written to all the same, at the price of a private mapping, which cannot be pinned; on a CPU they always
    can.
    """

    def __init__(
        self, group: str, number: int | None, device: torch.device | None = None, *, writable: bool = False
    ) -> None:
        self.group = group
        self.number = number
        self._device = device
        self._mode: Mode | None = "cow" if writable else None
        self._pid = os.getpid()
        self._reader: Reader | None = None
        self._making = threading.Lock()
        self._next_try: dict[str, float] = {}  # a lane's name -> when joining may be tried again
        self._joined: set[str] = set()

    def notice(self, invitation: Invitation) -> None:
        """Join a lane, in the background; at once done for one that is joined. Never raises."""
        name = invitation.name
        if self.number is None or self._next_try.get(name, 0.0) > time.monotonic():
            return
        if self._reader is not None and name in self._reader.lanes():
            return
        self._next_try[name] = inf
        try:
            threading.Thread(target=self._join, args=(invitation,), name="mmlane-joining", daemon=True).start()
        except Exception as error:  # noqa: BLE001 - this may be in the middle of a collective
            self._not_joined(name, error)

    def _join(self, invitation: Invitation) -> None:
        assert self.number is not None
        try:
            with self._making:
                if self._reader is None:
                    self._reader = Reader(self.group, self.number, device=self._device)
            self._reader.join(invitation)
            self._joined.add(invitation.name)
            self._next_try[invitation.name] = 0.0  # should the connection be lost before the lane opens
        except Exception as error:  # noqa: BLE001 - whatever it is, this rank is served by segments
            self._not_joined(invitation.name, error)

    def _not_joined(self, name: str, error: Exception) -> None:
        failed(
            "join",
            error,
            f"this rank ({self.number} of {self.group}) is sent features by shared-memory segments, and tries"
            " again; MMLANE=backport silences this",
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

    def discard(self, ticket: bytes) -> None:
        """Release a ticket untaken. Can be called from finalizers."""
        if self._reader is not None and os.getpid() == self._pid:
            with suppress(LaneError):  # stale or of a lane that is gone: nothing to give back
                self._reader.discard(ticket)


# --- who takes part -----------------------------------------------------------------------------------------


def group_of(server_args: Any, dp_rank: int | None) -> str:
    """The reader group of a scheduler: the ranks of one data-parallel replica, also inside DP-attention."""
    count, _ = _groups(server_args)
    return f"dp{dp_rank or 0 if count > 1 else 0}"  # a router numbers engines that know nothing of each other, too


def readers_of(server_args: Any) -> dict[str, int]:
    """Reader group -> its number of ranks: those of the first pipeline stage, which receive from the tokenizer."""
    count, size = _groups(server_args)
    return {group_of(server_args, dp_rank): size for dp_rank in range(count)}


def _groups(server_args: Any) -> tuple[int, int]:
    """How many reader groups there are, and the ranks in each.

    From 0.5.19 on `server_args` is what the user typed, and the context what the engine made of it.
    """
    context: Any = sys.modules.get("sglang.srt.runtime_context")
    if hasattr(context, "num_dp_ranks_of"):  # from 0.5.22 on: replicas and attention groups are counted apart
        parallel = context.get_parallel()
        return parallel.num_dp_ranks, parallel.tp_size // parallel.attn_dp_size
    given = context.get_parallel() if hasattr(context, "derive_attention_widths") else server_args
    return given.dp_size, given.tp_size // given.dp_size if given.enable_dp_attention else given.tp_size


def on_cuda(server_args: Any) -> bool:
    """Whether the engine's models run on CUDA. From 0.5.19 on only the context knows, unless the user said so."""
    device = server_args.device
    if device is None:
        context: Any = sys.modules.get("sglang.srt.runtime_context")
        device = context.get_device().device
    return str(device).startswith("cuda") and torch.version.hip is None  # which torch calls cuda, too


def obstacle(server_args: Any) -> str:
    """Why an engine launched like this goes without a lane; "" when nothing is in the way."""
    if server_args.nnodes > 1:
        return f"{server_args.nnodes} nodes, and a lane is one machine's memory"
    if getattr(server_args, "elastic_ep_backend", None):
        return "--elastic-ep-backend, where ranks may come later"
    if server_args.skip_tokenizer_init:
        return "--skip-tokenizer-init, where the engine sends features inside their requests"
    wrapping: Any = sys.modules.get("sglang.srt.managers.mm_utils")
    if hasattr(wrapping, "_get_is_default_transport") and wrapping._get_is_default_transport():
        return "--dist-init-addr, which this release takes for several nodes (leave it out on one)"
    return ""


def become_producer(
    manager: Any, server_args: Any, *, multimodal: bool, capacity: int | None, pinned: int | None = None
) -> None:
    """Called in a process that tokenizes, once its tokenizer manager is there."""
    found = obstacle(server_args)
    made: Producer | None = None
    if not found:
        workers = max(server_args.tokenizer_worker_num, 1)
        if capacity is None:
            capacity = memory.default_capacity() // workers
        if pinned is None:
            pinned = PINNED // workers
        made = producers[manager] = Producer(
            readers_of(server_args),
            capacity,
            pinned=pinned if on_cuda(server_args) else 0,
            metrics=server_args.enable_metrics,
        )
        if multimodal:
            made.try_out()
    elif multimodal:
        logger.warning(
            "mmlane: no lane with %s; features travel as they do without it; MMLANE=backport silences this", found
        )
    if server_args.enable_metrics:
        _begin_metrics(manager, lambda: "off" if made is None else made.state)


def become_rank(
    server_args: Any, dp_rank: int | None, pp_rank: int, tp_rank: int, *, pinned: int | None = None
) -> None:
    """Called in the thread of a scheduler that has set its device."""
    global rank
    device = None
    if on_cuda(server_args):
        device = torch.device("cuda", torch.cuda.current_device())
        watch_streams()  # before the scheduler sets its own
    number = None if pp_rank else tp_rank % _groups(server_args)[1]  # ranks of an attention group are neighbours
    rank = Rank(group_of(server_args, dp_rank), number, device, writable=pinned == 0)
    with guarded("metrics", "failures of this rank are not counted in /metrics"):
        if server_args.enable_metrics:
            from mmlane_patches import metrics  # noqa: F401 - it counts them
    if not (dp_rank or pp_rank or tp_rank) and os.environ.get("SGLANG_RUST_SERVER", "0").lower() not in (
        "",
        "0",
        "false",
    ):
        logger.warning(
            "mmlane: no lane with SGLANG_RUST_SERVER, which makes its segments itself; features travel as they do"
            " without it; MMLANE=backport silences this"
        )
