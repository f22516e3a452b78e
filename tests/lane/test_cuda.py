"""Readers with a device: pinned memory, and extents that come back after the device has read them.

The device is a stand-in (fake_cuda.py); tests/gpu has the same on a real one.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlane.lane import Lane, Reader, UnknownLane, cuda, device, memory, pinnable, protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.inbox import Inbox
from mmlane.lane.libc import libc
from mmlane.lane.pinned import Pinned
from tests.conftest import CHECKOUT
from tests.lane.harness.fake_cuda import FakeGpu, FakeStream
from tests.lane.harness.lane_with_readers import SEGMENT, LaneWithReaders, lane_with_readers
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

PINNED = 4 * SEGMENT


@pytest.fixture
def pair(gpu: FakeGpu) -> Iterator[LaneWithReaders]:
    with lane_with_readers(device="cuda:0", pinned=PINNED) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        yield pair


def access(address: int) -> str:
    """What may be done with the mapping that begins there, in the kernel's words."""
    maps = Path("/proc/self/maps").read_text()
    (found,) = re.findall(rf"^{address:x}-\S+ (\S+)", maps, re.MULTILINE)
    return str(found)


# --- pinned memory -----------------------------------------------------------------------------------------


def test_what_the_lane_keeps_is_registered_and_tensors_lie_in_it(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    assert list(gpu.registered.values()) == [PINNED]
    tensor = random((SEGMENT,))
    taken = pair.reader.take(pair.put(tensor))
    assert gpu.has_registered(taken) and same(taken, tensor)


def test_what_is_registered_can_be_written_to_until_then_and_not_after(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many drivers refuse to register a read-only mapping; and only the producer may write (6)."""
    seen: list[str] = []
    register = gpu.register

    def registering(address: int, nbytes: int) -> None:
        seen.append(access(address))
        register(address, nbytes)

    monkeypatch.setattr(gpu, "register", registering)
    with lane_with_readers(device="cuda:0", pinned=PINNED) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        (start,) = gpu.registered
        assert seen == ["rw-s"] and access(start) == "r--s"


def test_a_tensor_that_is_not_in_it_as_a_whole_is_not_in_it_at_all(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """CUDA refuses to copy from a place that is registered in part."""
    first = pair.reader.take(pair.put(random((PINNED - SEGMENT,))))
    crossing = random((2 * SEGMENT,), seed=1)
    taken = pair.reader.take(pair.put(crossing))
    (start,) = gpu.registered
    assert gpu.has_registered(first) and same(taken, crossing)
    assert not start <= taken.data_ptr() < start + PINNED


def test_modes_by_default(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """A view where tensors are only read to be copied; elsewhere what can be written to."""
    ticket = pair.put(random((SEGMENT,)))
    assert gpu.has_registered(pair.reader.take(ticket))
    with lane_with_readers() as plain:
        taken = plain.reader.take(plain.put(random((SEGMENT,))))
        taken += 1
        del taken


@pytest.mark.parametrize("mode", ["cow", "clone"])
def test_other_modes_with_a_device(gpu: FakeGpu, pair: LaneWithReaders, mode: Any) -> None:
    tensor = random((SEGMENT,))
    taken = pair.reader.take(pair.put(tensor), mode)
    taken += 1
    assert not gpu.has_registered(taken) and not same(taken, tensor)
    del taken
    pair.wait_until_nothing_is_out()


def test_nothing_is_registered_that_is_not_kept(gpu: FakeGpu) -> None:
    with lane_with_readers(device="cuda:0") as pair:
        tensor = random((SEGMENT,))
        taken = pair.reader.take(pair.put(tensor))
        assert same(taken, tensor) and not gpu.registered
        assert not pair.reader.wait_pinned(pair.lane.name, 0)
        del taken


def test_a_reader_without_a_device_registers_nothing(gpu: FakeGpu) -> None:
    with lane_with_readers(pinned=PINNED) as pair:
        eventually(lambda: pair.lane.stats().pinned_bytes == PINNED, "the memory is kept")
        assert same(pair.reader.take(pair.put(random((9,)))), random((9,)))
        assert not gpu.registered


def test_a_refusal_is_said_once_and_tensors_come_pageable(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.refuses = "cudaHostRegister: operation not supported"
    with lane_with_readers(device="cuda:0", pinned=PINNED) as pair:
        assert not pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        for seed in range(3):
            tensor = random((SEGMENT,), seed=seed)
            assert same(pair.reader.take(pair.put(tensor)), tensor)
        pair.wait_until_nothing_is_out()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "not pinned (cudaHostRegister: operation not supported)" in said and "slower" in said


def test_kept_memory_stays_and_other_memory_goes(gpu: FakeGpu) -> None:
    with lane_with_readers(device="cuda:0", pinned=PINNED, idle=0.05) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        pair.reader.discard(pair.put(random((8 * SEGMENT,))))
        assert pair.lane.stats().committed_bytes > PINNED
        eventually(lambda: pair.lane.stats().committed_bytes == PINNED, "what was idle is handed back")
        eventually(lambda: pair.lane._control.agenda.next_look is None, "no further look is planned")
        assert list(gpu.registered.values()) == [PINNED] and pair.lane.stats().pinned_bytes == PINNED


def test_every_reader_pins_for_itself(gpu: FakeGpu) -> None:
    with lane_with_readers(2, device="cuda:0", pinned=PINNED) as pair:
        for reader in pair.readers:
            assert reader.wait_pinned(pair.lane.name, DEADLINE)
        assert list(gpu.registered.values()) == [PINNED, PINNED]
        pair.readers.pop().close()
        eventually(lambda: len(gpu.registered) == 1, "it is unregistered")


def test_no_memory_to_keep(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grant = memory.Backing.grant

    def full(self: memory.Backing, nbytes: int) -> memory.Grant:
        if nbytes > 2 * SEGMENT:
            raise OSError(12, "no room")
        return grant(self, nbytes)

    monkeypatch.setattr(memory.Backing, "grant", full)
    with lane_with_readers(device="cuda:0", pinned=PINNED) as pair:
        eventually(lambda: "no memory for" in caplog.text, "it is said")
        tensor = random((SEGMENT,))
        assert same(pair.reader.take(pair.put(tensor)), tensor)
        assert not gpu.registered and pair.lane.stats().pinned_bytes == 0
        pair.wait_until_nothing_is_out()
    assert caplog.text.count("no memory for") == 1 and "make `pinned` smaller" in caplog.text


@pytest.mark.parametrize("kept", [(3, 4096), (0, 0), (0, 1 << 40), (1 << 40, 4096)])
def test_nonsense_to_keep_is_ignored(gpu: FakeGpu, kept: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with lane_with_readers(device="cuda:0") as pair:
        asked: list[Any] = []
        monkeypatch.setattr(pair.reader._device, "pin", lambda *args: asked.append(args))
        (member,) = pair.lane.members
        assert pair.lane._control.inbox.send(protocol.PINNED, [kept], member)
        assert pair.lane._control.inbox.send(protocol.RECALL, [(9, 9)], member)  # what is never seen is answered
        eventually(lambda: pair.lane.stats().malformed_messages, "it has been heard")
        assert not asked
        pair.lane._issuer.malformed_messages = 0  # the answer, to a question that the lane does not know of


def test_a_member_that_could_not_be_told_is_told_later_and_none_twice(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket may be full. What one reader has registered stays committed whatever becomes of others."""
    told: list[Member] = []
    send = Inbox.send

    def sending(self: Inbox, kind: int, items: Any, member: Member) -> bool:
        if kind == protocol.PINNED:
            told.append(member)
            if member.number and told.count(member) < 3:
                return False
        return send(self, kind, items, member)

    monkeypatch.setattr(Inbox, "send", sending)
    with lane_with_readers(2, device="cuda:0", pinned=PINNED, idle=0.05) as pair:
        for reader in pair.readers:
            assert reader.wait_pinned(pair.lane.name, DEADLINE)
        eventually(lambda: pair.lane._control.agenda.next_look is None, "no further look is planned")
        assert [member.number for member in sorted(told)] == [0, 1, 1, 1]
        assert len(gpu.registered) == 2
        assert pair.lane.stats().committed_bytes == pair.lane.stats().pinned_bytes == PINNED


def test_closing_does_not_wait_for_all_that_is_to_be_kept(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the step that the control thread is at."""
    reserving, go_on = threading.Event(), threading.Event()
    reserve = memory.Backing.reserve
    reserved: list[int] = []

    def slow(self: memory.Backing, offset: int, nbytes: int) -> None:
        if nbytes == SEGMENT:
            reserving.set()
            assert go_on.wait(DEADLINE)
            reserved.append(offset)
        reserve(self, offset, nbytes)

    monkeypatch.setattr(memory.Backing, "reserve", slow)
    with lane_with_readers(device="cuda:0", pinned=16 * SEGMENT) as pair:
        assert reserving.wait(DEADLINE)
        with in_a_thread(pair.lane.close):
            eventually(lambda: pair.lane.is_closed, "it is closed")
            go_on.set()
    assert len(reserved) <= pinnable._STEP < 16


# --- what the device still reads ---------------------------------------------------------------------------


ALL = 16 * SEGMENT  # the lane's room


def bytes_of_others(pair: LaneWithReaders, stream: FakeStream) -> int:
    """Of a tensor of zeros that fills the lane: how many bytes the device has from those that came after.

    It is let go as soon as it is to be copied. The stream stands still until the lane has heard of all there is to
    hear, and others have been put.
    """
    stream.stands_still = True
    on_device = stream.copy(pair.reader.take(pair.put(torch.zeros(ALL, dtype=torch.uint8))))
    eventually(
        lambda: len(stream.work) == 2 or pair.nothing_is_out(), "an event is behind the copy, or none will be"
    )
    ticket = pair.lane.put(torch.ones(ALL, dtype=torch.uint8))
    if isinstance(ticket, bytes):
        pair.reader.discard(ticket)
    stream.run()
    return int(on_device.sum())


def test_room_that_the_device_still_reads_is_not_released(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    assert bytes_of_others(pair, gpu.default) == 0
    pair.wait_until_nothing_is_out()


def test_without_events_room_is_released_too_early(
    gpu: FakeGpu, pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test before can fail: with no event recorded, the device reads the next tensor's bytes."""
    monkeypatch.setattr(device.Device, "_record", lambda self, streams: [])
    assert bytes_of_others(pair, gpu.default) == ALL


def test_memory_that_is_not_pinned_is_not_released_while_the_device_reads(gpu: FakeGpu) -> None:
    """Where a GPU can read any memory, a pageable copy may be under way just so."""
    with lane_with_readers(device="cuda:0") as pair:
        assert bytes_of_others(pair, gpu.default) == 0
        pair.wait_until_nothing_is_out()


def test_events_on_every_stream_that_was_current(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """The stream of the copy need not be that of the thread in which the tensor is let go."""
    side = FakeStream()
    with gpu.stream(side):
        assert gpu.current is side
    assert bytes_of_others(pair, side) == 0
    pair.wait_until_nothing_is_out()


def test_events_on_the_default_stream(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """A thread that has set none copies there, whatever the one that took the tensor has."""
    with gpu.stream(FakeStream()):
        assert bytes_of_others(pair, gpu.default) == 0
    pair.wait_until_nothing_is_out()


def test_events_on_the_streams_of_taking_and_of_letting_go(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """They may have been current since before the reader watched."""
    taking, letting_go = FakeStream(), FakeStream()
    with gpu.stream(taking, seen=False):
        taken = pair.reader.take(pair.put(random((SEGMENT,))))
    with gpu.stream(letting_go, seen=False):
        taking.stands_still = letting_go.stands_still = True
        del taken
    for stream in (taking, letting_go):
        eventually(lambda stream=stream: len(stream.work) == 1, "an event is recorded")  # type: ignore[misc]
        assert not pair.nothing_is_out()
        stream.run()
    pair.wait_until_nothing_is_out()


def test_a_stream_that_is_being_captured_is_waited_for(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    """An event that is recorded into a graph never passes."""
    gpu.default.captures = True
    taken = pair.reader.take(pair.put(random((SEGMENT,))))
    del taken
    gpu.asked.acquire(timeout=DEADLINE)
    gpu.asked.acquire(timeout=DEADLINE)  # it has looked, and looks again
    assert not pair.nothing_is_out()
    gpu.default.captures = False
    pair.wait_until_nothing_is_out()


def test_when_cuda_fails_nothing_is_released_until_it_works(
    gpu: FakeGpu, pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "_AFTER_ERROR", 0.01)
    gpu.default.stands_still = True
    first = pair.reader.take(pair.put(random((SEGMENT,))))
    del first
    eventually(lambda: gpu.default.work, "an event is recorded")
    gpu.broken = "an illegal memory access was encountered"
    second = pair.reader.take(pair.put(random((SEGMENT,), seed=1)))
    del second
    eventually(lambda: "cannot tell what the GPU has read" in caplog.text, "it is said")
    gpu.default.run()
    for _ in range(20):
        assert gpu.asked.acquire(timeout=DEADLINE)
    assert pair.lane.stats().tickets == 2
    gpu.broken = ""
    pair.wait_until_nothing_is_out()
    assert caplog.text.count("cannot tell what the GPU has read") == 1


def test_any_error_of_torch_counts_as_one_of_cuda(
    gpu: FakeGpu, pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "_AFTER_ERROR", 0.01)
    failing = True
    record = gpu.record

    def recording(stream: FakeStream) -> Any:
        if failing:
            raise AssertionError("Torch not compiled with CUDA enabled")
        return record(stream)

    monkeypatch.setattr(gpu, "record", recording)
    taken = pair.reader.take(pair.put(random((SEGMENT,))))
    del taken
    eventually(lambda: "Torch not compiled" in caplog.text, "it is said")
    failing = False
    pair.wait_until_nothing_is_out()


def test_a_release_that_fails_keeps_no_other(
    gpu: FakeGpu, pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.default.stands_still = True
    held = [pair.reader.take(pair.put(random((9,)))) for _ in range(5)]
    (link,) = pair.reader._listener.links.values()
    send_soon = link.outbox.send
    failed: list[tuple[int, int, int]] = []

    def failing(kind: int, slot: int, serial: int) -> None:
        if failed:
            send_soon(kind, slot, serial)
        else:
            failed.append((kind, slot, serial))
            raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(link.outbox, "send", failing)
        held.clear()
        gpu.default.run()
        eventually(lambda: pair.lane.stats().tickets == 1, "all but that one are back")
    assert caplog.text.count("could not release a tensor") == 1
    send_soon(*failed[0])


def test_a_release_that_was_interrupted_waits_for_the_device_too(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made up for when the producer asks after the ticket, and then the device may still read."""
    with lane_with_readers(device="cuda:0", pinned=PINNED, idle=0.02, orphan=0.02) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        tensor = random((SEGMENT,))
        taken = pair.reader.take(pair.put(tensor))
        gpu.default.stands_still = True
        on_device = gpu.default.copy(taken)
        settle = device.Device.settle
        times = count()

        def interrupted(self: device.Device, *args: Any) -> None:
            if not next(times):
                raise KeyboardInterrupt
            settle(self, *args)

        monkeypatch.setattr(device.Device, "settle", interrupted)
        monkeypatch.setattr(sys, "unraisablehook", lambda hook: None)  # no caller can catch it in a finalizer
        del taken
        eventually(lambda: len(gpu.default.work) > 1, "an event is behind the copy")
        assert pair.lane.stats().tickets == 1
        gpu.default.run()
        pair.wait_until_nothing_is_out()
        assert same(on_device, tensor) and not pair.reader._device._owed  # type: ignore[union-attr]


def test_what_cuda_does_not_unregister_is_not_mapped_anew(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would take whatever came to lie there for what it has registered."""

    def refuse(address: int) -> None:
        raise RuntimeError("cudaHostUnregister: driver shutting down")

    monkeypatch.setattr(gpu, "unregister", refuse)
    file = os.memfd_create("test")
    os.truncate(file, SEGMENT)
    pinned = Pinned(gpu, file, 0, SEGMENT)  # type: ignore[arg-type]
    address = pinned.address
    del pinned
    assert access(address) == "r--s"
    libc.munmap(address, SEGMENT)
    os.close(file)


def test_a_thread_that_lets_go_waits_for_nothing(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    gpu.default.stands_still = True
    held = [pair.reader.take(pair.put(random((9,)))) for _ in range(100)]
    letting_go = threading.Thread(target=held.clear)
    letting_go.start()
    letting_go.join(DEADLINE)
    assert not letting_go.is_alive()
    gpu.default.run()
    pair.wait_until_nothing_is_out()


def test_a_forked_child_does_not_touch_the_device(gpu: FakeGpu, pair: LaneWithReaders) -> None:
    held = [pair.reader.take(pair.put(random((9,))))]
    child = os.fork()
    if child == 0:
        held.clear()
        os._exit(0 if pair.reader._device._work.empty() else 1)  # type: ignore[union-attr]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.clear()
    pair.wait_until_nothing_is_out()


# --- the end -----------------------------------------------------------------------------------------------


def test_a_reader_that_is_closed_unregisters_when_the_device_has_read(gpu: FakeGpu) -> None:
    """It leaves at once, which ends the lane; but what the device reads stays as it is (4)."""
    with lane_with_readers(device="cuda:0", pinned=PINNED) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        tensor = random((SEGMENT,))
        gpu.default.stands_still = True
        on_device = gpu.default.copy(pair.reader.take(pair.put(tensor)))
        assert pair.reader._device is not None
        device, thread = weakref.ref(pair.reader._device), pair.reader._device._thread
        pair.readers.pop().close()
        eventually(lambda: len(gpu.default.work) >= 2, "it waits for the device")
        eventually(lambda: pair.lane.is_closed, "it has left")
        assert gpu.registered
        gpu.default.run()
        eventually(lambda: not gpu.registered, "it is unregistered")
        assert same(on_device, tensor)
        thread.join(DEADLINE)
        eventually(lambda: gc.collect() * 0 or device() is None, "nothing of it is left")


def test_a_producer_that_ends_is_unregistered(gpu: FakeGpu) -> None:
    reader = Reader("tp", device="cuda:0", linger=0.05)
    with Lane({"tp": 1}, capacity=16 * SEGMENT, segment=SEGMENT, pinned=PINNED) as lane:
        reader.join(lane.invitation)
        assert reader.wait_pinned(lane.name, DEADLINE)
        ticket = lane.put(random((SEGMENT,)))
        assert isinstance(ticket, bytes)
        taken = reader.take(ticket)
    with pytest.raises(UnknownLane):
        while True:
            reader.wait_pinned(lane.name)
    assert gpu.registered and same(taken, random((SEGMENT,)))
    del taken
    eventually(lambda: not gpu.registered, "it is unregistered with its last tensor")
    reader.close()


EXIT = """
import atexit
import sys

import torch

from mmlane.lane import Lane, Reader, cuda
from tests.lane.harness.fake_cuda import FakeGpu

cuda.Cuda = gpu = FakeGpu()
atexit.register(lambda: print(len(gpu.registered)))  # after what was registered later
lane, reader = Lane({"tp": 1}, capacity=1 << 20, pinned=1 << 20), Reader("tp", device="cuda:0")
reader.join(lane.invitation)
assert reader.wait_pinned(lane.name, 60)
held = reader.take(lane.put(torch.ones(9)))
print(len(gpu.registered))
gpu.broken = sys.argv[1]
"""


@pytest.mark.parametrize(("broken", "left"), [("", 0), ("an illegal memory access was encountered", 1)])
def test_at_exit_it_is_unregistered_unless_cuda_has_failed(broken: str, left: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EXIT, broken],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"1\n{left}\n", "")


# --- with torch as it is here ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu"), "cuda"])
def test_a_device_that_is_not_one_of_cudas(device: str | torch.device) -> None:
    """`cuda` alone means another one in every thread."""
    with pytest.raises(ValueError, match="one like cuda:0, or None"):
        Reader("tp", device=device)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="finds"):
        Reader("tp", device=f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize(("looks", "recorded"), [((False, False), True), ((True,), False), ((False, True), False)])
def test_no_event_of_a_capture(looks: tuple[bool, ...], recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it begins between the look and the event, whose query would invalidate it."""
    events: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            events.append(self)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    left = list(looks)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: left.pop(0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    event = cuda.Cuda(0).record(object())
    assert (event is not None) is recorded and not left
    assert event in (None, *events)


def test_streams_are_noted_when_they_are_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_stream", made_current.append)

    class Stream:
        def __init__(self, device_index: int) -> None:
            self.device_index = device_index

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "_streams", {})
    here, there = cuda.Cuda(0), cuda.Cuda(1)
    cuda.watch_streams()
    cuda.watch_streams()

    one, two, three = Stream(0), Stream(1), Stream(1)
    for stream in (one, two, one, None):
        torch.cuda.set_stream(stream)  # type: ignore[arg-type]
    assert made_current == [one, two, one, None]  # once each: it is not wrapped twice
    with three as entered:  # which torch does in C++
        assert entered is three
    assert here.streams() == [one] and there.streams() == [two, three]
