"""Pointers with tickets: through a real lane from a producer to a rank, in front of our class and of the engine's.

Producer and rank are at home in this process; what stands between them, a relay, in one of its own.
"""

from __future__ import annotations

import ast
import copy
import errno
import gc
import logging
import mmap
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from multiprocessing import shared_memory
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, Optional

import pytest

torch = pytest.importorskip("torch")
import msgpack  # type: ignore[import-untyped]  # noqa: E402

from devkit.wheels import wheel_source  # noqa: E402
from mmlane.lane import (  # noqa: E402
    Invitation,
    Lane,
    MalformedTicket,
    StaleHere,
    StaleTicket,
    TicketError,
    UnknownLane,
    protocol,
    status,
)
from mmlane.lane.ticket import read  # noqa: E402
from mmlane_patches import guard, lanes, pointer, receiving, tickets  # noqa: E402
from mmlane_patches.agreement import LostFeatures  # noqa: E402
from mmlane_patches.sending import unlink_if_unsent  # noqa: E402
from tests.lane.harness.breakpoints import Gate  # noqa: E402
from tests.lane.harness.child import run  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread  # noqa: E402

ENGINE = "0.5.23"  # its own class stands on 0.5.21 and later
MM_UTILS = "sglang.srt.managers.mm_utils"
PARENTS = ("sglang", "sglang.srt", "sglang.srt.managers")
LARGE = lanes.INLINE + 1
OFFSET = 19  # of a ticket's byte that says where its tensor lies
MIB = 1 << 20


# --- the engine's module ------------------------------------------------------------------------------------


@cache
def engines(file: str, *names: str) -> CodeType:
    """The definitions of functions and classes in the engine's source."""
    path = wheel_source(ENGINE) / "sglang/srt" / file
    found = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if getattr(n, "name", "") in names]
    assert len(found) == len(names)
    return compile(ast.Module(found, []), str(path), "exec")


def define(module: dict[str, Any], file: str, *names: str) -> None:
    """Functions and classes of the engine's source, as globals of a module."""
    exec(engines(file, *names), module)


def mm_utils(base: str) -> ModuleType:
    """The engine's module with the one class, ours or its own, before it is replaced."""
    module = ModuleType(MM_UTILS)
    if base == "ours":
        vars(module)["ShmPointerMMData"] = pointer.in_its_place(object)
        return module
    vars(module).update(
        {"torch": torch, "os": os, "sys": sys, "mmap": mmap, "Optional": Optional, "shared_memory": shared_memory},
        make_shm_name=lambda kind: pointer.segment_name(),
        logger=logging.getLogger("engine"),
    )
    define(vars(module), "managers/mm_utils.py", "ShmPointerMMData")
    return module


def patched(base: str) -> ModuleType:
    module = mm_utils(base)
    vars(module)["ShmPointerMMData"] = tickets.in_front_of(vars(module)["ShmPointerMMData"])
    return module


@pytest.fixture(params=["ours", "engine's"])
def base(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def module(base: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = patched(base)
    for name in PARENTS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, MM_UTILS, module)
    return module


@pytest.fixture
def wrap(module: ModuleType) -> Callable[..., Any]:
    """`ShmPointerMMData` as the engine calls it."""
    made: Callable[..., Any] = vars(module)["ShmPointerMMData"]
    return made


# --- both ends ----------------------------------------------------------------------------------------------


class Ends:
    """A producer and a rank, and the lane between them as soon as there is one."""

    def __init__(self) -> None:
        self.producer = lanes.Producer({"dp0": 1}, 64 * MIB)
        self.rank = lanes.Rank("dp0", 0)
        self.rejected = 0  # ranks that the test has the lane reject

    @property
    def lane(self) -> Lane:
        assert self.producer.lane is not None
        return self.producer.lane

    @property
    def out(self) -> int:
        """Tickets that are out, now that the rank has discarded what it was told to."""
        self._see_it_discard()
        return self.lane.stats().tickets

    def _see_it_discard(self) -> None:
        """Wait for the rank's thread, which discards one ticket after the other."""
        ticket, _ = self.producer.put(torch.ones(LARGE))
        if ticket is None:
            return  # there is no open lane
        last = read(ticket).serial
        self.rank.discard(ticket)

        def is_over() -> bool:
            self.lane.drain()
            return all(live.serial != last for live in self.lane._tickets.live.values())

        eventually(is_over, "the rank discards a ticket")

    def settle(self) -> None:
        """Have what was recalled asked after now, not at the next of the looks, one a minute."""
        if self.out:
            self.lane.look()
        eventually(lambda: self.out == 0, "all tickets have ended")

    def open(self, wrap: Callable[..., Any]) -> None:
        """As it happens in the engine: a first feature goes by segment, and invites the rank."""
        assert through_pickle(wrap(torch.ones(LARGE))).materialize().sum() == LARGE
        assert self.lane.wait_open(DEADLINE)

    def close(self) -> None:
        if self.rank._reader is not None:
            self.rank._reader.close()
        if self.producer.lane is not None:
            self.producer.lane.close()


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Before the first feature. Afterwards nothing may be left, in the lane or outside of it."""
    ends = Ends()
    sending = lanes.producer.set(ends.producer)  # as while its manager sends
    monkeypatch.setattr(lanes, "rank", ends.rank)
    monkeypatch.setattr(pointer, "_warned", set())
    try:
        yield ends
        gc.collect()
        if ends.producer.lane is not None and not ends.lane.is_closed:
            ends.settle()
            stats = ends.lane.stats()
            assert (stats.used_bytes, stats.malformed_messages, stats.rejected_peers) == (0, 0, ends.rejected)
        assert segments() == []
    finally:
        for file in segments():
            file.unlink()
        lanes.producer.reset(sending)
        ends.close()


@pytest.fixture
def ends(shut: Ends, wrap: Callable[..., Any]) -> Ends:
    """With an open lane."""
    shut.open(wrap)
    return shut


def segments() -> list[Path]:
    return list(pointer.SHM.glob(f"{pointer.PREFIX}{os.getpid()}_*"))


def random(nbytes: int = LARGE, seed: int = 0) -> Any:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def empty(value: Any) -> Any:
    """One of its class as the engine's codec makes it, without a constructor."""
    cls: Any = type(value)
    return cls.__new__(cls)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_msgpack(value: Any) -> Any:
    """As the engine's codec does it: by the state's plain values, rebuilt without a constructor."""
    names = ("_torch_dtype_name", "_torch_dtype_from_name", "_to_msgpack_state", "_from_msgpack_state")
    codec: dict[str, Any] = {"torch": torch, "np": SimpleNamespace(dtype=())}
    define(codec, "utils/msgpack_utils.py", *names)

    def tensor(data: Any) -> Any:
        return msgpack.ExtType(2, pickle.dumps(data))

    packed = msgpack.packb(codec["_to_msgpack_state"](value.__getstate__()), default=tensor, strict_types=True)
    state = msgpack.unpackb(packed, ext_hook=lambda code, data: pickle.loads(data))
    received = object.__new__(type(value))
    received.__setstate__(codec["_from_msgpack_state"](state))
    return received


def through_a_relay(value: Any, base: str) -> Any:
    return pickle.loads(run(relay, base, pickle.dumps(value)))


def relay(base: str, message: bytes) -> bytes:
    """In a process that is neither producer nor rank: what it passes on, it drops."""
    for name in PARENTS:
        sys.modules[name] = ModuleType(name)
    sys.modules[MM_UTILS] = patched(base)
    sent = pickle.dumps(pickle.loads(message))
    gc.collect()
    return sent


def tampered(value: Any) -> Any:
    """The pointer as it arrives when a byte of its ticket was changed; the original is lost."""
    state = value.__getstate__()
    ticket = bytearray(state["ticket"])
    ticket[OFFSET] ^= 1
    received = object.__new__(type(value))
    received.__setstate__({**state, "ticket": bytes(ticket)})
    value.close_and_unlink()
    return received


def request(*values: Any, rid: str = "r") -> Any:
    items = [SimpleNamespace(feature=value, precomputed_embeddings=None) for value in values]
    return SimpleNamespace(rid=rid, mm_inputs=SimpleNamespace(mm_items=items))


def features(of: Any) -> list[Any]:
    return [item.feature for item in of.mm_inputs.mm_items]


def invitation_of(value: Any) -> Invitation:
    """The one that a pointer carries, as it would be sent now."""
    return Invitation.parse(value.__getstate__()["invitation"])


# --- how a tensor travels -----------------------------------------------------------------------------------


def test_the_engine_and_its_codec_recognize_the_class(wrap: Any, base: str) -> None:
    assert (wrap.__name__, wrap.__qualname__, wrap.__module__) == (
        "ShmPointerMMData",
        "ShmPointerMMData",
        MM_UTILS,
    )
    assert issubclass(wrap, pointer.SegmentPointer) == (base == "ours")


def test_a_small_tensor_travels_in_its_request(shut: Ends, wrap: Any) -> None:
    whole = random(lanes.INLINE)
    assert wrap(whole) is whole
    part = wrap(random(MIB)[7:23])
    assert type(part) is torch.Tensor and torch.equal(part, random(MIB)[7:23])
    assert len(pickle.dumps(part)) < 2000
    assert wrap(torch.zeros(1).expand(9)).tolist() == [0] * 9
    assert shut.producer.lane is None  # what is small opens no lane


def test_a_small_tensor_without_storage_stays_itself(shut: Ends, wrap: Any) -> None:
    sparse = torch.eye(3).to_sparse()
    assert wrap(sparse) is sparse


def test_what_cannot_be_looked_at_goes_as_it_would(
    shut: Ends, wrap: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(tensor: Any) -> Any:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(guard, "_said", set())
    monkeypatch.setattr(tickets, "by_itself", fails)
    assert torch.equal(through_pickle(wrap(torch.ones(9))).materialize(), torch.ones(9))
    assert "mmlane: inline failed: ZeroDivisionError: mine; " in caplog.text


def test_without_a_producer_all_is_as_before(wrap: Any) -> None:
    sent = wrap(random(), precomputed_hash=7)
    assert sent.ticket is None and sent.invitation is None
    received = through_pickle(sent)
    assert torch.equal(received.materialize(), random()) and received.precomputed_hash == 7
    assert segments() == []


def test_the_first_feature_opens_the_lane(shut: Ends, wrap: Any) -> None:
    first = wrap(random(), precomputed_hash=7)
    assert isinstance(first, wrap) and first.ticket is None and invitation_of(first) == shut.lane.invitation
    assert not first.travels_by_lane and not shut.lane.is_open
    received = through_pickle(first)
    assert invitation_of(received) == shut.lane.invitation and received.precomputed_hash == 7
    assert torch.equal(received.materialize(), random())
    assert shut.lane.wait_open(DEADLINE)  # the invitation has made the rank join
    second = wrap(random())
    assert isinstance(second, wrap) and second.ticket is not None and second.invitation is None
    assert (shut.out, segments()) == (1, [])


@pytest.mark.parametrize("travel", [through_pickle, through_msgpack])
def test_a_ticket_travels(ends: Ends, wrap: Any, travel: Callable[[Any], Any]) -> None:
    tensor = random(4 * LARGE).view(torch.float32).reshape(-1, 1)[::3]
    sent = wrap(tensor, precomputed_hash=2**63 + 1)
    assert (sent.shape, sent.dtype, ends.out) == (tensor.shape, torch.float32, 1)
    assert len(pickle.dumps(sent)) < 600
    received = travel(sent)
    assert received.travels_by_lane and received.precomputed_hash == 2**63 + 1
    assert (received.shape, received.dtype) == (tensor.shape, torch.float32)
    assert type(received.shape) is torch.Size
    taken = received.materialize()
    assert torch.equal(taken.view(torch.int32), tensor.view(torch.int32))
    taken.zero_()  # is this process's own
    del received
    assert ends.out == 1
    del taken
    assert ends.out == 0


def shows(text: str, secret: bytes) -> bool:
    """Whether somebody who reads a text learns a part of a secret."""
    halves = secret[: len(secret) // 2], secret[len(secret) // 2 :]
    return any(form in text for half in halves for form in (half.hex(), repr(half)[2:-1], str(list(half))[1:-1]))


def test_no_repr_and_no_line_shows_the_secret(
    shut: Ends, wrap: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the message itself holds it, as bytes: who reads logs cannot join."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(guard, "_said", set())
    sent = wrap(random())
    invitation, secret = shut.lane.invitation, shut.lane.invitation.secret
    message = pickle.dumps(sent)
    assert sent.__getstate__()["invitation"] == bytes(invitation) and secret in message
    assert shows(repr(sent.__getstate__()), secret)
    received = [pickle.loads(message)]
    for rank in (lanes.Rank("dp0", 7), lanes.Rank("dp1", 0)):  # whom the lane refuses
        with monkeypatch.context() as another:
            another.setattr(lanes, "rank", rank)
            received.append(pickle.loads(message))
            eventually(lambda: "join" in str(guard._said), "it fails to join")
        if rank._reader is not None:
            rank._reader.close()
        guard._said.clear()
    with monkeypatch.context() as damaged:
        damaged.setattr(lanes, "rank", lanes.Rank("dp0", 0))
        received.append(empty(sent))
        received[-1].__setstate__({**sent.__getstate__(), "invitation": b"another " + secret})
    assert shut.lane.wait_open(DEADLINE)
    eventually(lambda: shut.lane.stats().rejected_peers == 2, "the producer's lines")
    assert caplog.text.count("mmlane: join failed") == 3 and "rejected a process" in caplog.text
    for value in (sent, *received):
        assert not shows(repr(value) + repr(vars(value)), secret)
    assert not shows(caplog.text + repr(vars(lanes.rank)) + repr(vars(shut.producer)) + repr(shut.lane), secret)
    assert all(torch.equal(value.materialize(), random()) for value in received[:1])
    for value in received:
        value.close_and_unlink()
    shut.rejected = 2


@pytest.mark.parametrize(
    "invitation",
    [
        lambda good: good.replace(struct.pack("<H", protocol.VERSION), struct.pack("<H", protocol.VERSION + 1), 1),
        lambda good: b"another " + good,
        lambda good: good[:30],
        lambda good: good + b"\xff",
        lambda good: b"",
        lambda good: good.decode("latin-1"),
        lambda good: 7,
    ],
    ids=["newer", "another", "cut", "not text", "empty", "text", "number"],
)
def test_an_invitation_that_cannot_be_read_is_one_line(
    shut: Ends,
    wrap: Any,
    invitation: Callable[[bytes], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rank goes on by segments, and joins with the next good one."""
    monkeypatch.setattr(guard, "_said", set())
    before = guard.failures["join"]
    for seed in range(3):
        state = wrap(random(seed=seed)).__getstate__()
        received = wrap.__new__(wrap)
        bad = invitation(state["invitation"])
        received.__setstate__({**state, "invitation": bad})
        assert not received.travels_by_lane
        passed_on = received.__getstate__().get("invitation")  # to others, which may be of its version
        assert passed_on == (bad if isinstance(bad, bytes) else None)
        assert torch.equal(received.materialize(), random(seed=seed))
    assert guard.failures["join"] == before + 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("mmlane: join failed: MalformedInvitation: ") and "by shared-memory segments" in line
    assert re.search("run one version of mmlane|damaged|not an invitation", line)
    assert shut.rank._reader is None
    shut.open(wrap)


def test_what_protocol_2_sends_is_a_segment(shut: Ends, wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It names its lane as "lane", a text. There is no secret in it to join with, so it says nothing to us."""
    caplog.set_level(logging.DEBUG)
    sending = lanes.producer.set(None)
    state = {**wrap(random(), precomputed_hash=7).__getstate__(), "lane": f"mmlane-{os.getpid()}-0123456789abcdef"}
    lanes.producer.reset(sending)
    received = wrap.__new__(wrap)
    received.__setstate__(state)
    assert received.precomputed_hash == 7 and received.invitation is None and not received.travels_by_lane
    passed_on = through_pickle(received)
    assert "lane" not in passed_on.__getstate__()
    assert torch.equal(passed_on.materialize(), random())
    assert shut.rank._next_try == {} and caplog.records == []


def test_a_lane_that_is_switched_off_and_on_again(ends: Ends, wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        status.switch(ends.lane.name, off=True)
        for seed in range(2):
            sent = wrap(random(seed=seed))
            assert sent.ticket is None and sent.invitation is None
            assert torch.equal(through_pickle(sent).materialize(), random(seed=seed))
        status.switch(ends.lane.name, off=False)
        received = through_pickle(wrap(random()))
        assert received.ticket is not None and torch.equal(received.materialize(), random())
        del received
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "(off)" in line and "shared-memory segment" in line


def test_the_state_is_of_plain_values(ends: Ends, wrap: Any) -> None:
    sent = wrap(random(), precomputed_hash=1)
    kinds = {type(value) for value in sent.__getstate__().values()}
    assert kinds <= {bytes, str, tuple, torch.Size, torch.dtype, int}
    through_pickle(sent)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples(ends: Ends, wrap: Any, kind: Any) -> None:
    sent = request(kind(wrap(random(seed=seed)) for seed in range(3)))
    assert ends.out == 3
    received = through_pickle(sent)
    assert tickets.take([received]) == []
    (feature,) = features(received)
    assert type(feature) is kind
    assert all(torch.equal(value, random(seed=seed)) for seed, value in enumerate(feature))


def test_a_relay_changes_nothing(ends: Ends, wrap: Any, base: str) -> None:
    sent = wrap(random(), precomputed_hash=5)
    received = through_a_relay(sent, base)
    assert ends.out == 1
    assert received.ticket == sent.ticket and received.precomputed_hash == 5
    assert torch.equal(received.materialize(), random())


def test_a_relay_passes_the_invitation_on(shut: Ends, wrap: Any, base: str) -> None:
    received = through_a_relay(wrap(random()), base)
    assert shut.lane.wait_open(DEADLINE)
    assert torch.equal(received.materialize(), random())


def test_a_rank_passes_the_invitation_on(shut: Ends, wrap: Any) -> None:
    """As the rank does that broadcasts to its peers, who must join, too."""
    received = through_pickle(wrap(random()))
    assert invitation_of(received) == shut.lane.invitation
    assert torch.equal(through_pickle(received).materialize(), random())
    assert shut.lane.wait_open(DEADLINE)


def test_a_rank_that_passes_it_on_keeps_its_own(ends: Ends, wrap: Any) -> None:
    """As the rank does that broadcasts to its peers."""
    received = through_pickle(wrap(random()))
    message = pickle.dumps(received)
    assert torch.equal(received.materialize(), random())
    with pytest.raises(StaleTicket):
        pickle.loads(message).materialize()  # in a peer, that would be another reader


# --- no room ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_room(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no place for a segment. Our class then gives the tensor, the engine's raises."""

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "made to fail")

    monkeypatch.setattr(pointer, "SharedMemory", full)
    monkeypatch.setitem(vars(module), "shared_memory", SimpleNamespace(SharedMemory=full))


@pytest.mark.parametrize("travel", [through_pickle, through_msgpack])
def test_the_tensor_itself_carries_the_invitation(
    shut: Ends, wrap: Any, no_room: None, travel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    part = random(MIB)[1 : 1 + LARGE]
    sent = [wrap(part, precomputed_hash=7), wrap(part)]
    assert [type(value) for value in sent] == [wrap, wrap] and invitation_of(sent[0]) == shut.lane.invitation
    assert len(pickle.dumps(sent[0])) < 2 * LARGE
    received = travel(sent[0])
    assert received.travels_by_lane and received.precomputed_hash == 7 and received.shape == part.shape
    assert shut.lane.wait_open(DEADLINE)
    arrived = request(received)
    assert tickets.take([arrived]) == []
    assert torch.equal(features(arrived)[0], part)
    for value in (sent[0], received):
        value.close_and_unlink()  # there is nothing to let go of
    assert caplog.text.count("is sent inline") == 1


def test_with_a_lane_that_can_say_nothing_the_base_decides(
    ends: Ends, wrap: Any, base: str, no_room: None
) -> None:
    ends.lane.close()
    tensor = random()
    if base == "ours":
        assert wrap(tensor) is tensor
    else:
        with pytest.raises(OSError, match="made to fail"):
            wrap(tensor)


# --- whose a ticket is --------------------------------------------------------------------------------------


def test_a_copy_is_the_same_pointer(ends: Ends, wrap: Any) -> None:
    sent = wrap(random())
    assert copy.copy(sent) is sent and copy.deepcopy([sent])[0] is sent
    assert through_pickle(sent).materialize().sum() == random().sum()


def test_dropped_unsent_it_is_withdrawn(ends: Ends, wrap: Any) -> None:
    sent = wrap(random())
    assert ends.out == 1
    del sent
    assert ends.out == 0


def test_dropped_when_sent_it_is_the_receivers(ends: Ends, wrap: Any) -> None:
    message = pickle.dumps(wrap(random()))
    assert ends.out == 1
    assert torch.equal(pickle.loads(message).materialize(), random())


def test_dropped_unread_in_a_rank_it_is_released(ends: Ends, wrap: Any) -> None:
    received = through_pickle(wrap(random()))
    assert ends.out == 1
    del received
    assert ends.out == 0


def test_it_is_taken_once(ends: Ends, wrap: Any) -> None:
    message = pickle.dumps(wrap(random()))
    one, other = pickle.loads(message), pickle.loads(message)
    tensor = one.materialize()
    assert one.materialize() is tensor
    with pytest.raises(StaleTicket):
        other.materialize()
    del other
    assert ends.out == 1  # which is not released for the other one's sake
    del one
    assert torch.equal(tensor, random())


def test_a_forked_child_leaves_its_parents_ticket_alone(ends: Ends, wrap: Any) -> None:
    sent, due = wrap(random()), through_pickle(wrap(random(seed=1)))
    pid = os.fork()
    if pid == 0:
        del sent, due
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ends.out == 2
    assert torch.equal(through_pickle(sent).materialize(), random())
    assert torch.equal(due.materialize(), random(seed=1))


# --- letting go ---------------------------------------------------------------------------------------------


def test_letting_go_unsent(ends: Ends, wrap: Any) -> None:
    sent = wrap(random())
    for _ in range(2):
        sent.close_and_unlink()
        assert ends.out == 0
    with pytest.raises(StaleTicket):
        through_pickle(sent).materialize()


def test_letting_go_of_what_may_have_been_sent(ends: Ends, wrap: Any) -> None:
    """Not at once: somebody may be about to take it."""
    sent = wrap(random())
    message = pickle.dumps(sent)
    sent.close_and_unlink()
    assert ends.out == 1
    ends.settle()
    with pytest.raises(StaleTicket):
        pickle.loads(message).materialize()


def test_who_has_it_keeps_what_was_recalled(ends: Ends, wrap: Any) -> None:
    sent = wrap(random())
    taken = through_pickle(sent).materialize()
    sent.close_and_unlink()
    ends.lane.look()
    assert torch.equal(taken, random()) and ends.out == 1


def test_letting_go_in_a_rank(ends: Ends, wrap: Any) -> None:
    received = through_pickle(wrap(random()))
    for _ in range(2):
        received.close_and_unlink()
        assert ends.out == 0
    with pytest.raises(StaleTicket):
        received.materialize()


def test_a_finalizer_waits_for_nobody(ends: Ends, wrap: Any) -> None:
    """The garbage collector runs it anywhere, a collective included, where it must not wait for other threads."""
    due, recalled = [through_pickle(wrap(random()))], wrap(random(seed=1))
    pickle.dumps(recalled)
    assert ends.rank._reader is not None
    link = ends.rank._reader._links[ends.lane.name]
    gate = Gate("recall.heard", where="beside")  # the rank's own thread
    recalled.close_and_unlink()
    ends.lane.look()
    gate.wait()
    with locked(link._claiming), in_a_thread(due.clear):
        pass
    assert ends.lane.stats().tickets == 2
    gate.open()
    eventually(lambda: ends.lane.stats().tickets == 0, "the rank's thread sees to both")


@contextmanager
def locked(lock: Any) -> Iterator[None]:
    """While inside, another thread has a lock."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            assert over.wait(DEADLINE)

    with in_a_thread(hold):
        assert taken.wait(DEADLINE)
        try:
            yield
        finally:
            over.set()


def test_letting_go_of_what_was_taken(ends: Ends, wrap: Any) -> None:
    received = through_pickle(wrap(random()))
    tensor = received.materialize()
    received.close_and_unlink()
    del received
    assert torch.equal(tensor, random()) and ends.out == 1


def test_letting_go_of_a_segment(shut: Ends, wrap: Any) -> None:
    first = wrap(random())
    assert len(segments()) == 1
    through_pickle(first).close_and_unlink()
    assert segments() == []


def test_a_relay_that_lets_go_releases_nothing(ends: Ends, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = pickle.dumps(wrap(random()))
    with monkeypatch.context() as relay:
        relay.setattr(lanes, "rank", None)
        received = pickle.loads(message)
        received.close_and_unlink()
        with pytest.raises(UnknownLane, match="no rank"):
            received.materialize()
        del received
    assert ends.out == 1
    assert torch.equal(pickle.loads(message).materialize(), random())


class Unpicklable:
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("mine")


def test_what_cannot_be_sent_comes_back(ends: Ends, wrap: Any) -> None:
    def send(self: Any, tokenized_obj: Any) -> bytes:
        parts = tokenized_obj.mm_inputs
        return pickle.dumps([wrap(part) if isinstance(part, torch.Tensor) else part for part in parts])

    def sent(*parts: Any) -> Any:
        return unlink_if_unsent(send)(None, SimpleNamespace(mm_inputs=parts))

    with pytest.raises(pickle.PicklingError):
        sent(Unpicklable(), random())
    assert ends.out == 0  # this one was not even pickled
    with pytest.raises(pickle.PicklingError):
        sent(random(), Unpicklable())
    ends.settle()
    received = pickle.loads(sent(random(), "text"))
    assert torch.equal(received[0].materialize(), random())


# --- tickets that cannot be taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ticket", "error"),
    [
        (lambda ticket: b"garbage", MalformedTicket),
        (lambda ticket: ticket[:-1], MalformedTicket),
        (lambda ticket: ticket.decode("latin-1"), MalformedTicket),
        (lambda ticket: ticket.replace(b"mmlane-", b"mmlame-"), UnknownLane),
        (lambda ticket: ticket[:OFFSET] + b"\1" + ticket[OFFSET + 1 :], StaleTicket),
    ],
    ids=["garbage", "cut", "text", "foreign", "changed"],
)
def test_what_is_no_good_ticket_is_an_error_when_it_is_taken(
    ends: Ends, wrap: Any, ticket: Callable[[bytes], Any], error: type[TicketError]
) -> None:
    sent = wrap(random())
    received = empty(sent)
    received.__setstate__({**sent.__getstate__(), "ticket": ticket(sent.ticket)})
    with pytest.raises(error):
        received.materialize()
    received.close_and_unlink()
    other = empty(sent)
    other.__setstate__({**sent.__getstate__(), "ticket": ticket(sent.ticket)})
    del other  # unread
    assert ends.out == 1
    assert torch.equal(through_pickle(sent).materialize(), random())


def test_a_rank_without_a_lane_has_no_ticket(ends: Ends, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    message = pickle.dumps(wrap(random()))
    with monkeypatch.context() as other:
        other.setattr(lanes, "rank", lanes.Rank("dp0", 0))
        received = pickle.loads(message)
        with pytest.raises(UnknownLane, match="has joined no lane"):
            received.materialize()
        pickle.loads(message).close_and_unlink()
    assert pickle.loads(message).materialize().sum() == random().sum()


def not_seen(ends: Ends, ticket: bytes) -> Callable[[], None]:
    """It was recalled when this rank had not seen it. The producer gets the answer by what is returned."""
    assert ends.rank._reader is not None
    content = read(ticket)
    link = ends.rank._reader._links[content.lane]
    answers: list[tuple[int, int, int]] = []
    with pytest.MonkeyPatch.context() as under_way:
        under_way.setattr(link, "_send_soon", lambda *answer: answers.append(answer))
        link.promise(content.slot, content.serial)
    return lambda: link._send_soon(*answers[0])


def not_joined(ends: Ends, ticket: bytes) -> Callable[[], None]:
    """Another process that knows the secret has joined as this rank's number."""
    lanes.rank = lanes.Rank("dp0", 0)
    lanes.rank._next_try[read(ticket).lane] = inf
    return lambda: None


@pytest.mark.parametrize("happens", [not_seen, not_joined])
def test_what_only_this_rank_may_have_lost_is_no_lost_request(
    ends: Ends, wrap: Any, happens: Callable[[Ends, bytes], Callable[[], None]]
) -> None:
    """Its peers may take it, and would wait for this rank: it ends."""
    sent = wrap(random())
    received = request(through_pickle(sent))
    go_on = happens(ends, sent.ticket)
    with pytest.raises(StaleHere):
        tickets.take([received])
    go_on()
    lanes.rank = ends.rank
    received.mm_inputs = None
    pickle.loads(pickle.dumps(sent)).close_and_unlink()


@pytest.fixture
def arrived(ends: Ends, wrap: Any) -> Callable[[], SimpleNamespace]:
    """Requests as a rank has them, by itself and in a batch: two can be taken, two have lost one of three."""

    def make() -> SimpleNamespace:
        def good(seed: int) -> Any:
            return through_pickle(wrap(random(seed=seed)))

        def lossy(rid: str) -> Any:
            return request(good(7), [good(8), tampered(wrap(random(seed=9)))], good(10), rid=rid)

        found = SimpleNamespace(
            lost=lossy("lost"), whole=request(good(1), rid="whole"), lost2=lossy("lost2"), whole2=request(good(2))
        )
        found.batch = SimpleNamespace(batch=[found.lost2, found.whole2])
        found.requests = [found.lost, SimpleNamespace(rid="text"), found.whole, found.batch]
        return found

    return make


def test_only_the_request_that_lost_one_fails(ends: Ends, arrived: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = arrived()
    recalled_are = 2  # the originals of those that were tampered with
    assert ends.out == 2 * 3 + 2 + recalled_are
    lost = tickets.take(found.requests)
    assert [request for request, _ in lost] == [found.lost, found.lost2]
    assert all("multimodal features are lost" in why and "send it again" in why for _, why in lost)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"] and "lost2" in caplog.text
    assert torch.equal(features(found.whole)[0], random(seed=1))
    assert torch.equal(features(found.whole2)[0], random(seed=2))
    for request_, _ in lost:
        request_.mm_inputs = None
    assert ends.out == 2 + recalled_are  # what else the lost ones had is released
    del found, lost, request_
    assert ends.out == recalled_are


def test_up_to_0_5_18_it_leaves_its_batch(ends: Ends, arrived: Any) -> None:
    found = arrived()
    receiver = SimpleNamespace(
        server_args=SimpleNamespace(enable_dp_attention=False), tp_size=1, tp_cpu_group=None
    )
    seen: list[Any] = []
    receiving.agree_before(lambda self, requests: seen.extend(requests))(receiver, found.requests)
    assert [getattr(request, "rid", None) for request in seen] == ["lost", "text", "whole", None, "lost2"]
    assert found.batch.batch == [found.whole2]
    assert isinstance(found.lost.mm_inputs, LostFeatures) and isinstance(found.lost2.mm_inputs, LostFeatures)
    assert torch.equal(features(found.whole2)[0], random(seed=2))
    assert ends.out == 2 + 2  # those that are whole, and the originals of those that were tampered with


@pytest.fixture
def process_error(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type:
    """The engine's mark of a request that lost its features, from 0.5.19 on."""
    io_struct = ModuleType("sglang.srt.managers.io_struct")
    mark = type("MMInputsProcessError", (Exception,), {})
    vars(io_struct)["MMInputsProcessError"] = mark
    monkeypatch.setitem(sys.modules, io_struct.__name__, io_struct)
    return mark


def test_from_0_5_19_it_has_the_engines_mark(ends: Ends, arrived: Any, process_error: type) -> None:
    found = arrived()
    seen: list[Any] = []
    finalize = receiving.take_tickets_before(lambda self, requests: seen.append(requests))
    finalize(None, found.requests)
    finalize(None, None)
    assert seen[0] is found.requests and seen[1] is None
    assert isinstance(found.lost.mm_inputs, process_error) and isinstance(found.lost2.mm_inputs, process_error)
    assert found.batch.batch == [found.lost2, found.whole2]
    assert torch.equal(features(found.whole)[0], random(seed=1))


def test_segments_are_left_to_who_agrees_on_them(shut: Ends, wrap: Any) -> None:
    received = request(through_pickle(wrap(random())))
    assert tickets.take([received]) == []
    (left,) = features(received)
    assert isinstance(left, wrap) and torch.equal(left.materialize(), random())


def test_the_segment_of_a_lost_request_goes_with_it(shut: Ends, wrap: Any) -> None:
    """Of a request that was wrapped while the lane opened."""
    by_segment = wrap(random())
    shut.open(wrap)
    received = request(through_pickle(by_segment), tampered(wrap(random())))
    ((lost, _),) = tickets.take([received])
    lost.mm_inputs = None
    assert segments() == []


def test_the_patch_file_brings_in_neither_torch_nor_the_engine() -> None:
    code = "import sys, mmlane_patches.arena; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
