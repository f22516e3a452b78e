"""How a rank receives requests, from top to bottom.

The engine's scheduler is made, and gives this process its side (`start`). It receives requests, with pointers in
them that have been broadcast to all ranks. What each rank can take alone is taken (tickets of a lane); for the
rest, segments, the ranks agree first on what is lost (`agreement`); then it is taken as well
(`SchedulerSide.take`). A request that has lost a feature is refused, on all ranks.

The engine's receiving functions stay as they are. Where one of them receives, waits and takes (up to 0.5.12), the
two that it calls for that do nothing then (`_is_receiving`), and we agree and take afterwards. Where waiting
and taking have a function of their own, we agree and take before it, and it finds nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from mmlane.engine.launch import on_cuda, rust_server, without_lane
from mmlane.engine.requests import id_of, refuse
from mmlane.engine.scheduler import (
    answer_tokenizer,
    may_hold_pointers,
    put_before_broadcast,
    receiver_of,
    unwrap,
    wake_when_readable,
)
from mmlane.engine.topology import (
    RankPlace,
    carrying_groups,
    group_of,
    is_on_several_nodes,
    node_of,
    number_of,
    peers_of,
)
from mmlane.lane import Lane, memory
from mmlane.lane.cuda import watch_streams
from mmlane.log import guarded, logger
from mmlane.transport.agreement import (
    Arrival,
    RefusedInputs,
    aborted,
    agree,
    arrivals,
    end_on_error,
    move_out_of_batches,
    taker,
)
from mmlane.transport.base import LostFeature, Scheduler
from mmlane.transport.chain import Chain
from mmlane.transport.crossing import Landing
from mmlane.transport.gate import Gate
from mmlane.transport.leader_copy import LeaderCopyTransport
from mmlane.transport.nodes import Route, announce, name_of
from mmlane.transport.pointer import is_pointer, our_class_is_in_place, slot
from mmlane.transport.wire import TorchWire


class SchedulerSide:
    """A process with a rank of the engine.

    receiving: whether `Scheduler.recv_requests` runs, on releases where that would wait and take without us.
    count_bytes: told what went to other nodes, or came from them. capacity, pinned: bytes of the lane that a node
    without a tokenizer has for what comes from others; capacity None: the machine's share.
    """

    def __init__(self, chain: Chain, *, capacity: int | None = None, pinned: int = 0) -> None:
        self.chain = chain
        self.receiving = False
        self.count_bytes: Callable[[str, int], None] = lambda direction, count: None
        self._capacity, self._pinned = capacity, pinned
        self._landing: Landing | None = None

    def land(self, route: Route) -> None:
        """The rank that receives requests says where all are: if this one leads its node, it has a lane for it."""
        here, me = self.chain.here, torch.distributed.get_rank()
        copies = self.chain.find(LeaderCopyTransport)
        assert isinstance(here, Scheduler) and isinstance(copies, LeaderCopyTransport)
        leaders = [node.ranks[0] for node in route]
        if self._landing is not None or me not in leaders[1:]:
            return
        end = leaders.index(me)
        readers = {here.group: len(route[end].ranks)}
        capacity = self._capacity or memory.default_capacity()
        self._landing = Landing(
            end,
            len(leaders),
            lambda: TorchWire(leaders),
            lambda: Lane(readers, capacity=capacity, pinned=min(self._pinned, capacity)),
            copies.kept,
            self.count_bytes,
        )

    def take(self, requests: list[Any], groups: Callable[[], list[Any]] | None) -> list[tuple[Any, str]]:
        """Put tensors in the place of pointers; which requests have lost a feature instead, and why.

        groups: those that carried the requests; None where the engine agrees on segments itself, and takes them.
        Every rank comes to the same end. Raises what may be so on this rank alone, `StaleHere` among it.
        """
        arrived = arrivals(requests)
        for arrival in arrived:
            _take_alone(arrival)
        if groups is not None:
            if waiting := [arrival for arrival in arrived if not arrival.lost and arrival.pointers()]:
                agree(groups(), waiting)
            for arrival in waiting:
                if not arrival.lost:
                    for place in arrival.places:
                        place.replace(taker(place, of=is_pointer))
        return [(arrival.request, arrival.lost) for arrival in arrived if arrival.lost]


def _take_alone(arrival: Arrival) -> None:
    """Take what needs no agreement: every rank comes to the same end without asking the others."""
    try:
        for place in arrival.places:
            place.replace(taker(place, of=_is_taken_alone))
    except LostFeature as error:
        if slot.chain.here.node and not any(pointer.lost for pointer in arrival.pointers()):
            # The rank that received it could take it, and other nodes may, too.
            raise RuntimeError(f"features of a request are lost on this node alone: {error}") from error
        arrival.lost = str(error)
        logger.error("request %s: %s", id_of(arrival.request), arrival.lost)
        arrival.release()


def _is_taken_alone(value: Any) -> bool:
    return is_pointer(value) and not value.payload.needs_agreement


def start(scheduler: Any, server_args: Any, place: RankPlace, *, capacity: int | None, pinned: int) -> None:
    """Make this process a rank that can join lanes. Called in the thread of a scheduler that has set its device.

    capacity: bytes of a lane, None: the machine's share. pinned: bytes of it that ranks on CUDA register; 0: none,
    features can then be written to.
    """
    device = None
    if on_cuda(server_args):
        device = torch.device("cuda", torch.cuda.current_device())
        watch_streams()  # before the scheduler sets its own
    here = Scheduler(
        group_of(server_args, place.dp_rank),
        number_of(server_args, place),
        device,
        writable=pinned == 0,
        engine_class=slot.chain.here.engine_class,
        node=name_of(node_of(server_args, place)) if _takes_part(server_args, place) else "",
    )
    this = SchedulerSide(Chain(here), capacity=capacity, pinned=pinned if device is not None else 0)
    with guarded("metrics", "failures of this rank are not counted in /metrics"):
        if server_args.enable_metrics:
            from mmlane.transport import metrics  # which counts them

            this.count_bytes = metrics.count_node_bytes
    if here.node:
        _take_part(scheduler, server_args, place, this)  # if that fails, this rank joins no lane
    _become(this)
    if rust_server() and not any(place):
        logger.warning(
            "no lane with SGLANG_RUST_SERVER, which makes its segments itself; features travel as they do"
            " without it; MMLANE=backport silences this"
        )


def _takes_part(server_args: Any, place: RankPlace) -> bool:
    """Whether a rank receives what ranks of other nodes receive, too, in a launch that has a lane."""
    return is_on_several_nodes(server_args, place) and not place.pp_rank and not without_lane(server_args)


def _take_part(scheduler: Any, server_args: Any, place: RankPlace, this: SchedulerSide) -> None:
    """Announce this rank to those on other nodes; where it is the first of them, open the gate."""
    ranks = peers_of(server_args, place)
    if ranks[0] == place.tp_rank:
        receiver = receiver_of(scheduler)

        def answer(request: Any, message: str) -> None:
            answer_tokenizer(scheduler, request, aborted(request, message))

        gate = Gate(ranks, this.chain.here.node, receiver.input_blocker, answer, this.count_bytes)
        put_before_broadcast(receiver, gate)
        wake_when_readable(scheduler, gate.wakeup)
    announce(this.chain.here.node)


def _become(side: SchedulerSide) -> SchedulerSide:
    slot.scheduler, slot.chain = side, side.chain
    return side


def side() -> SchedulerSide:
    """This process's side; made now where no lane is wanted, so that `start` was not called."""
    return slot.scheduler or _become(SchedulerSide(slot.chain))


def take_after(recv_requests: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`Scheduler.recv_requests` of 0.5.9 - 0.5.12, which neither waits nor takes while it runs (the next two)."""

    @wraps(recv_requests)
    def receive(self: Any) -> Any:
        this = side()
        this.receiving = True
        try:
            received = recv_requests(self)
        finally:
            this.receiving = False
        _take_and_refuse(self, received)
        if received and not our_class_is_in_place():
            _take_others(self, received)
        return received

    return receive


def _take_others(receiver: Any, received: list[Any]) -> None:
    """Take the pointers of another plugin that has replaced ours since, as the engine would have done."""
    if may_hold_pointers(received):
        for group in carrying_groups(receiver):
            torch.distributed.barrier(group=group)
        for request in received:
            unwrap(request)


def unwrap_nothing_while_receiving(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`unwrap_shm_features(obj)` of 0.5.9 - 0.5.12."""

    @wraps(unwrap)
    def unwrap_shm_features(obj: Any) -> Any:
        return obj if _is_receiving() else unwrap(obj)

    return unwrap_shm_features


def has_nothing_while_receiving(has: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """`has_shm_features(recv_reqs)` of 0.5.10 - 0.5.12."""

    @wraps(has)
    def has_shm_features(recv_reqs: Any) -> bool:
        return not _is_receiving() and has(recv_reqs)

    return has_shm_features


def _is_receiving() -> bool:
    return slot.scheduler is not None and slot.scheduler.receiving


def take_before(finalize: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`SchedulerRequestReceiver._finalize_shm_features` of 0.5.13 - 0.5.18, which finds nothing left to do."""

    @wraps(finalize)
    def finalize_shm_features(self: Any, recv_reqs: list[Any] | None) -> None:
        _take_and_refuse(self, recv_reqs)
        finalize(self, recv_reqs)

    return finalize_shm_features


def take_alone_before(finalize: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`SchedulerRequestReceiver._finalize_shm_features` from 0.5.19 on, which agrees on what segments are left."""
    from sglang.srt.managers.io_struct import MMInputsProcessError

    @wraps(finalize)
    def finalize_shm_features(self: Any, recv_reqs: list[Any] | None) -> None:
        if recv_reqs:
            with end_on_error():
                for request, message in side().take(recv_reqs, None):
                    refuse(request, MMInputsProcessError(message))
        finalize(self, recv_reqs)

    return finalize_shm_features


def _take_and_refuse(receiver: Any, received: list[Any] | None) -> None:
    """Take what was received, and have requests that lost a feature handled alone (`agreement.refuse_lost`)."""
    if not received:
        return
    with end_on_error():
        lost = side().take(received, lambda: carrying_groups(receiver))
        for request, message in lost:
            refuse(request, RefusedInputs(message))
        move_out_of_batches(received, [request for request, _ in lost])
