"""What a controller passes on and what it takes, where some of its replicas are on other nodes: with a real lane.

The replica on this node, the controller and the replica elsewhere are this process in turn.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mmlane.engine.topology import CONTROLLER  # noqa: E402
from mmlane.lane import Reader  # noqa: E402
from mmlane.transport import controller_side  # noqa: E402
from mmlane.transport.base import Here, LostFeature, Scheduler, Tokenizer  # noqa: E402
from mmlane.transport.chain import Chain  # noqa: E402
from mmlane.transport.controller_side import RemoteReplica, sending_tensors  # noqa: E402
from mmlane.transport.inline import Inline, compact  # noqa: E402
from mmlane.transport.lane import LaneTransport, Producer, Ticket  # noqa: E402
from mmlane.transport.pointer import Sealed, ShmPointerMMData, is_pointer, slot, with_engine_segments  # noqa: E402
from tests.lane.harness.payloads import same  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402
from tests.unit.launches import launched, without_a_side  # noqa: E402

MIB = 1 << 20
ATTENTION = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "nnodes": 2}


class Socket:
    """Keeps what is sent by it."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.linger = 3

    def send_pyobj(self, message: Any, flags: int = 0, protocol: int = 5) -> None:
        self.sent.append(pickle.dumps(message, protocol))


def sock_send(socket: Any, obj: Any, flags: int = 0) -> None:
    """As the engine's, which makes bytes first."""
    socket.sent.append(pickle.dumps(obj))


class Item:
    """A multimodal item of the engine."""

    def __init__(self, feature: Any = None, precomputed_embeddings: Any = None) -> None:
        self.feature, self.precomputed_embeddings = feature, precomputed_embeddings
        self.model_specific_data: dict[str, Any] = {}


def request(*items: Item) -> Any:
    return SimpleNamespace(rid="one", mm_inputs=SimpleNamespace(mm_items=list(items)))


def feature(seed: int = 0) -> Any:
    return torch.rand(3, 50_000, generator=torch.Generator().manual_seed(seed))


class Launch:
    """The first node of a launch with DP-attention over two: its tokenizer, one rank here, and its controller."""

    def __init__(self) -> None:
        tokenizer = Chain(Tokenizer({"dp0": 1, CONTROLLER: 1}, 8 * MIB))
        self.rank = Chain(Scheduler("dp0", 0, writable=True))
        self.elsewhere = Chain(Scheduler("dp1", 0, writable=True))
        self.controller = SimpleNamespace(workers=[Socket(), Socket()])
        self.is_at(Chain(Here()))
        controller_side.start(self.controller, launched(**ATTENTION))
        self.tokenizer, self.process = tokenizer, slot.chain
        lane = tokenizer.find(LaneTransport)
        assert isinstance(lane, LaneTransport) and lane.producer is not None
        self.producer: Producer = lane.producer

    def is_at(self, chain: Chain) -> None:
        slot.chain = chain

    def sent(self, message: Any) -> Any:
        """As it arrives in the controller."""
        self.is_at(self.tokenizer)
        for item in message.mm_inputs.mm_items:
            # Ranks agree on no segments in such a launch.
            item.feature = ShmPointerMMData.of(
                item.feature, *self.tokenizer.offer(item.feature, ranks_agree=False), None
            )
        data = pickle.dumps(message)
        self.is_at(self.process)
        return pickle.loads(data)

    def arrived(self, replica: int) -> Any:
        """What a replica's rank has received last."""
        (data,) = self.socket(replica).sent
        self.socket(replica).sent.clear()
        self.is_at([self.rank, self.elsewhere][replica])
        message = pickle.loads(data)
        self.is_at(self.process)
        return message

    def socket(self, replica: int) -> Socket:
        found = self.controller.workers[replica]
        socket: Socket = found.socket if isinstance(found, RemoteReplica) else found
        return socket

    def open(self) -> None:
        """A message to each replica, which bring the invitation; then the lane is open."""
        for replica in range(2):
            self.controller.workers[replica].send_pyobj(self.sent(request(Item(feature()))))
            self.arrived(replica)
        assert self.producer.lane is not None and self.producer.lane.wait_open(DEADLINE)

    @property
    def tickets(self) -> int:
        assert self.producer.lane is not None
        return self.producer.lane.stats().tickets


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    without_a_side(monkeypatch)
    found = Launch()
    yield found
    for chain in (found.rank, found.process):
        lane = chain.find(LaneTransport)
        assert isinstance(lane, LaneTransport) and lane.rank is not None
        if lane.rank._reader is not None:
            lane.rank._reader.close()
    if found.producer.lane is not None:
        found.producer.lane.close()


def sent_by_pyobj(launch: Launch, replica: int, message: Any) -> None:
    launch.controller.workers[replica].send_pyobj(message, 0, protocol=4)


def sent_by_sock_send(launch: Launch, replica: int, message: Any) -> None:
    sending_tensors(sock_send)(launch.controller.workers[replica], message, 0)


SENDS = pytest.mark.parametrize("send", [sent_by_pyobj, sent_by_sock_send])
Send = Callable[[Launch, int, Any], None]


@SENDS
def test_what_stays_on_this_node_is_passed_on_unchanged(launch: Launch, send: Send) -> None:
    launch.open()
    message = launch.sent(request(Item(feature(1))))
    assert isinstance(message.mm_inputs.mm_items[0].feature.payload, Ticket)
    send(launch, 0, message)
    del message  # and nothing is released by that
    (item,) = launch.arrived(0).mm_inputs.mm_items
    assert launch.tickets == 1
    assert same(item.feature.materialize(), feature(1))
    del item
    eventually(lambda: launch.tickets == 0, "the ticket is released")


@SENDS
def test_what_goes_elsewhere_is_tensors_and_holds_no_room_here(launch: Launch, send: Send) -> None:
    launch.open()
    message = launch.sent(request(Item(feature(1)), Item(feature(2))))
    (third,) = launch.sent(request(Item(feature(3)))).mm_inputs.mm_items
    message.mm_inputs.mm_items[0].precomputed_embeddings = [third.feature]
    send(launch, 1, message)
    assert message.mm_inputs.mm_items[0].feature is None  # the engine keeps it until the next one comes
    third.feature.close_and_unlink()
    del third
    eventually(lambda: launch.tickets == 0, "the tickets are released")
    first, second = launch.arrived(1).mm_inputs.mm_items
    assert same(first.feature, feature(1)) and same(second.feature, feature(2))
    assert same(first.precomputed_embeddings[0], feature(3))
    for tensor in (first.feature, second.feature):
        assert type(tensor) is torch.Tensor and tensor.untyped_storage().nbytes() == tensor.nbytes


def test_no_invitation_leaves_this_node(launch: Launch) -> None:
    message = launch.sent(request(Item(feature(1))))
    pointer = message.mm_inputs.mm_items[0].feature
    assert isinstance(pointer.payload, Inline) and isinstance(pointer.invitation, Sealed)
    sent_by_sock_send(launch, 1, message)
    (item,) = launch.arrived(1).mm_inputs.mm_items
    assert type(item.feature) is torch.Tensor and same(item.feature, feature(1))


@SENDS
def test_what_is_lost_is_refused_by_the_ranks_that_it_goes_to(launch: Launch, send: Send) -> None:
    launch.open()
    message = launch.sent(request(Item(feature(1))))
    payload = message.mm_inputs.mm_items[0].feature.payload
    ticket = bytearray(payload.ticket)
    ticket[19] ^= 1  # of its offset
    payload.ticket = bytes(ticket)
    send(launch, 1, message)
    (item,) = launch.arrived(1).mm_inputs.mm_items
    assert is_pointer(item.feature)
    with pytest.raises(LostFeature, match="send it again"):
        item.feature.materialize()


def test_a_feature_that_cannot_be_taken_is_refused_alone(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.open()
    message = launch.sent(request(Item(feature(1)), Item(feature(2))))

    def failing(tensor: Any) -> Any:
        if same(tensor, feature(1)):
            raise MemoryError("none left")
        return compact(tensor)

    monkeypatch.setattr(controller_side, "compact", failing)
    sent_by_pyobj(launch, 1, message)
    eventually(lambda: launch.tickets == 0, "the tickets are released")
    first, second = launch.arrived(1).mm_inputs.mm_items
    with pytest.raises(LostFeature, match="none left"):
        first.feature.materialize()
    assert same(second.feature, feature(2))


def test_a_ticket_that_goes_elsewhere_untaken_is_released(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.open()
    message = launch.sent(request(Item(feature(1))))

    def take(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(Reader, "take", take)
        sent_by_pyobj(launch, 1, message)
    eventually(lambda: launch.tickets == 0, "the ticket is released")


def test_the_chain_stays_when_the_class_is_put_in_its_place_again(launch: Launch) -> None:
    with_engine_segments(object)
    assert slot.chain is launch.process


def test_a_message_without_features_is_not_changed(launch: Launch) -> None:
    for message in (SimpleNamespace(rid="text", mm_inputs=None), "flush"):
        sent_by_pyobj(launch, 1, message)
        assert launch.arrived(1) == message


def test_other_names_of_the_socket_are_its_own(launch: Launch) -> None:
    assert launch.controller.workers[1].linger == 3


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({**ATTENTION, "nnodes": 1}, 2),
        ({"dp_size": 2}, 2),
        ({**ATTENTION, "elastic_ep_backend": "mooncake"}, 2),
        (ATTENTION, 0),
    ],
    ids=["one node", "replicas of one node", "no lane", "the controller of another node"],
)
def test_controllers_that_need_no_side(
    options: dict[str, Any], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_side(monkeypatch)
    before = slot.chain
    sockets = [Socket() if number < workers else None for number in range(2)]
    controller_side.start(SimpleNamespace(workers=list(sockets)), launched(**options))
    assert slot.chain is before
