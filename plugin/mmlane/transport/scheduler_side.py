"""How a rank receives requests, from top to bottom.

The engine's scheduler is made, and gives this process its side (`start`). It receives requests, with pointers in
them that have been broadcast to all ranks. What each rank can take alone is taken (tickets of a lane); for the
rest, segments, the ranks agree first on what is lost (`agreement`); then it is taken as well
(`SchedulerSide.take`). A request that has lost a feature is refused, on all ranks.

The engine's receiving functions stay as they are. Where one of them receives, waits and takes (up to 0.5.12), the
two that it calls for that do nothing meanwhile (`_is_receiving`), and we agree and take afterwards. Where waiting
and taking have a function of their own, we agree and take before it, and it finds nothing left to do.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch

from mmlane.engine.requests import Place, items, items_of, own_items, places_of, refuse
from mmlane.engine.topology import (
    RankPlace,
    carrying_groups,
    group_of,
    is_on_several_nodes,
    node_of,
    number_of,
    on_cuda,
    peers_of,
    rust_server,
    without_lane,
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
    move_out_of_batches,
    or_end,
    taker,
)
from mmlane.transport.base import LostFeature, Scheduler
from mmlane.transport.chain import Chain
from mmlane.transport.hand import HandTransport
from mmlane.transport.inline import SMALL, is_sent
from mmlane.transport.link import Landing
from mmlane.transport.nodes import Gate, Route, announce, name_of
from mmlane.transport.pointer import are_ours, is_pointer, slot
from mmlane.transport.wire import TorchWire

# --- the side of a scheduler process ------------------------------------------------------------------------


class SchedulerSide:
    """A process with a rank of the engine.

    receiving: whether the engine's function runs that would wait and take by itself, on releases where it would.
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
        hand = self.chain.find(HandTransport)
        assert isinstance(here, Scheduler) and isinstance(hand, HandTransport)
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
            hand.kept,
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
        logger.error("request %s: %s", getattr(arrival.request, "rid", None), arrival.lost)
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
        engines=slot.chain.here.engines,
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
    import zmq

    ranks = peers_of(server_args, place)
    if ranks[0] == place.tp_rank:
        # From 0.5.13 on the engine receives with an object of its own.
        receiver = getattr(scheduler, "request_receiver", scheduler)

        def answer(request: Any, message: str) -> None:
            channels = getattr(scheduler, "ipc_channels", scheduler)
            channels.send_to_tokenizer.send_output(aborted(request, message), request)

        gate = Gate(ranks, this.chain.here.node, receiver.input_blocker, answer, this.count_bytes)
        object.__setattr__(receiver, "input_blocker", gate)  # it is frozen
        if getattr(scheduler, "idle_sleeper", None) is not None:  # --sleep-on-idle
            scheduler.idle_sleeper.poller.register(gate.bell, zmq.POLLIN)
    announce(this.chain.here.node)


def _become(side: SchedulerSide) -> SchedulerSide:
    slot.scheduler, slot.chain = side, side.chain
    return side


def side() -> SchedulerSide:
    """This process's side; made now where no lane is wanted, so that `start` was not called."""
    return slot.scheduler or _become(SchedulerSide(slot.chain))


# --- requests are received ----------------------------------------------------------------------------------


def take_after(recv_requests: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`Scheduler.recv_requests` of 0.5.9 - 0.5.12, which neither waits nor takes meanwhile (the next two)."""

    @wraps(recv_requests)
    def receive(self: Any) -> Any:
        this = side()
        this.receiving = True
        try:
            received = recv_requests(self)
        finally:
            this.receiving = False
        _take_and_refuse(self, received)
        if received and not are_ours():
            _take_others(self, received)
        return received

    return receive


def _take_others(receiver: Any, received: list[Any]) -> None:
    """Take the pointers of another plugin that has replaced ours since, as the engine would have done."""
    mm_utils = sys.modules["sglang.srt.managers.mm_utils"]
    has = getattr(mm_utils, "has_shm_features", None)  # not on 0.5.9
    if has is None or has(received):
        for group in carrying_groups(receiver):
            torch.distributed.barrier(group=group)
        for request in received:
            mm_utils.unwrap_shm_features(request)


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
            with or_end():
                for request, message in side().take(recv_reqs, None):
                    refuse(request, MMInputsProcessError(message))
        finalize(self, recv_reqs)

    return finalize_shm_features


def _take_and_refuse(receiver: Any, received: list[Any] | None) -> None:
    """Take what was received, and have what has lost a feature handled by itself (`agreement.refuse_lost`)."""
    if not received:
        return
    with or_end():
        lost = side().take(received, lambda: carrying_groups(receiver))
        for request, message in lost:
            refuse(request, RefusedInputs(message))
        move_out_of_batches(received, [request for request, _ in lost])


# --- requests are made ready, with --enable-broadcast-mm-inputs-process ---------------------------------------


def without_tensors(process: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`Scheduler._process_and_broadcast_mm_inputs(self, raw_mm_inputs)`, which broadcasts no tensors.

    The first rank hashes the inputs for all, and pickles them to ranks that have the same tensors already. There
    they are set aside meanwhile, and the others put their own in. 0.5.9, which splits items then, does as it did.
    """

    @wraps(process)
    def process_mm_inputs(self: Any, raw_mm_inputs: Any) -> Any:
        if not items_of(raw_mm_inputs) or isinstance(raw_mm_inputs, dict):
            return process(self, raw_mm_inputs)
        kept = [item for item in items_of(raw_mm_inputs) if item.is_valid()]  # as the engine does
        if self.dp_tp_group.rank_in_group == 0:
            with _set_aside(kept):
                return process(self, raw_mm_inputs)
        processed = process(self, raw_mm_inputs)
        for own, item in zip(kept, items_of(processed), strict=False):
            for place in places_of(own):
                if place.in_other(item).value is None:
                    place.in_other(item).put(place.value)
        return processed

    return process_mm_inputs


@contextmanager
def _set_aside(there: list[Any]) -> Iterator[None]:
    """While inside, items are hashed and have none of their large CPU tensors."""
    aside: list[tuple[Place, Any]] = []
    with suppress(Exception):  # the engine meets the same error where it hashes, and tells the other ranks
        for item in there:
            item.set_pad_value()
        aside = [(place, place.value) for item in there for place in places_of(item) if _is_large(place.values())]
    for place, _ in aside:
        place.put(None)
    try:
        yield
    finally:
        for place, value in aside:
            place.put(value)


def _is_large(values: list[Any]) -> bool:
    return all(map(is_sent, values)) and sum(value.nbytes for value in values) > SMALL


# --- requests are passed on to the next pipeline stage ------------------------------------------------------


def without_features(send: Callable[..., Any]) -> Callable[..., Any]:
    """`_pp_send_pyobj_to_next_stage(self, data, async_send=False)`: of `data`, the requests are sent lighter.

    The engine pickles requests to the next stage once it has taken their features, whole tensors that is, and each
    stage broadcasts them to all of its ranks. A later stage needs an item's `pad_value`, place and grid; its
    feature is read by the vision tower alone, which is on the first stage.
    """

    @wraps(send)
    def send_pyobj(self: Any, data: Any, async_send: bool = False) -> Any:
        with guarded("pipeline", "the next stage is sent all tensors, which is slower"):
            if isinstance(data, list):
                data = [_lighter(request) for request in data]
        return send(self, data, async_send)

    return send_pyobj


def _lighter(request: Any) -> Any:
    """A copy of a request without the tensors that are not needed any more; or the request itself."""
    if not any(map(_is_spare, items(request))):
        return request
    request = copy.copy(request)
    own_items(request)
    for item in filter(_is_spare, items(request)):
        item.feature = None
    return request


def _is_spare(item: Any) -> bool:
    """Whether later stages do without the feature: they would only compute `pad_value` from it, which is there."""
    feature = getattr(item, "feature", None)
    tensors = feature if isinstance(feature, list | tuple) else [feature]
    return getattr(item, "pad_value", None) is not None and all(isinstance(t, torch.Tensor) for t in tensors)
