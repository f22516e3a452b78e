"""The pinned lane on a real GPU: what tests/lane/test_cuda.py shows with a stand-in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest
import torch

from bench.gpu.device import lacking
from mmlane.lane import cuda, device
from tests.lane.harness.lane_with_readers import LaneWithReaders, lane_with_readers
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import DEADLINE, eventually

LACKING = lacking(None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]

MIB = 1 << 20
SIZE = 64 * MIB  # of the lane: one tensor fills it
gpu: Any = torch.cuda
LONG = 1_000_000_000  # cycles: about half a second, in which the host does a great deal


@pytest.fixture
def pair() -> Iterator[LaneWithReaders]:
    with lane_with_readers(device="cuda:0", capacity=SIZE, segment=4 * MIB, pinned=SIZE) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
        yield pair


def test_a_tensor_is_pinned_and_arrives(pair: LaneWithReaders) -> None:
    tensor = random((SIZE // 2,))
    taken = pair.reader.take(pair.put(tensor))
    assert taken.is_pinned() and same(taken.to("cuda", non_blocking=True).cpu(), tensor)
    del taken
    pair.wait_until_nothing_is_out()


def bytes_of_others(pair: LaneWithReaders, stream: Any) -> int:
    """Of a tensor of zeros that fills the lane: how many bytes the device has from one that came after it.

    Its copy is queued behind LONG on a stream, and it is let go at once.
    """
    zeros, others = torch.zeros(SIZE, dtype=torch.uint8), torch.ones(SIZE, dtype=torch.uint8)
    on_device = torch.full((SIZE,), 2, dtype=torch.uint8, device="cuda")  # now: cudaMalloc may wait for the device
    gpu._sleep(1)  # the same for the loading of a kernel
    gpu.synchronize()
    with gpu.stream(stream):
        gpu._sleep(LONG)
        on_device.copy_(pair.reader.take(pair.put(zeros)), non_blocking=True)
        passed = gpu.Event()
        passed.record()
    assert not passed.query(), "LONG was over too soon, or the copy was not asynchronous"

    def put() -> bool:
        ticket = pair.lane.put(others)
        if isinstance(ticket, bytes):
            pair.reader.discard(ticket)
        return isinstance(ticket, bytes) or passed.query()

    eventually(put, "there is room, or the device has read")
    gpu.synchronize()
    return int(on_device.sum())


def test_room_that_the_device_still_reads_is_not_released(pair: LaneWithReaders) -> None:
    for stream in (gpu.current_stream(), gpu.Stream()):
        assert bytes_of_others(pair, stream) == 0
        pair.wait_until_nothing_is_out()


def test_without_events_room_is_released_too_early(pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before can fail."""
    monkeypatch.setattr(device.Device, "_record", lambda self, streams: [])
    assert bytes_of_others(pair, gpu.Stream()) > 0


def test_a_graph_is_captured_while_tensors_are_let_go(pair: LaneWithReaders) -> None:
    """Neither disturbs the other, though a capture forbids all threads most calls by default."""
    source = torch.ones(9, device="cuda")
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        for seed in range(50):
            pair.reader.take(pair.put(random((MIB,), seed=seed)))
        result = source * 2
    graph.replay()
    gpu.synchronize()
    assert result.sum() == 18
    pair.wait_until_nothing_is_out()


def test_events_are_looked_at_during_a_capture(pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread for which that is allowed; by any other thread it would invalidate the capture."""
    looks: list[Any] = []
    query = gpu.Event.query

    def looking(event: Any) -> Any:
        looks.append(event)
        return query(event)

    monkeypatch.setattr(gpu.Event, "query", looking)
    source, other = torch.ones(9, device="cuda"), gpu.Stream()
    graph, doubled = gpu.CUDAGraph(), source * 2  # and its kernel is loaded
    gpu._sleep(1)
    gpu.synchronize()
    with gpu.stream(other):
        gpu._sleep(2 * LONG)
        pair.reader.take(pair.put(random((MIB,))))  # let go: behind the sleep there is an event now
    eventually(lambda: looks, "events are recorded")
    with gpu.stream(gpu.Stream()):
        graph.capture_begin()  # unlike `gpu.graph`, which waits for the device first
        before = len(looks)
        eventually(lambda: len(looks) > before, "they are looked at")
        again = source * 2
        graph.capture_end()
    graph.replay()
    gpu.synchronize()
    assert torch.equal(again, doubled)
    pair.wait_until_nothing_is_out()


def test_a_process_ends_well_with_memory_pinned() -> None:
    script = """
        import torch
        from mmlane.lane import Lane, Reader

        lane, reader = Lane({"tp": 1}, capacity=64 << 20, pinned=64 << 20), Reader("tp", device="cuda:0")
        reader.join(lane.invitation)
        assert reader.wait_pinned(lane.name, 60)
        held = reader.take(lane.put(torch.ones(1 << 20)))
        on_device = held.to("cuda", non_blocking=True)
        print(int(on_device.sum()))
        """
    ended = subprocess.run(
        [sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{1 << 20}\n", "")


def test_what_is_registered_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    undone: list[int] = []
    unregister = cuda.Cuda.unregister

    def noting(self: cuda.Cuda, address: int) -> None:
        unregister(self, address)  # raises when CUDA does not know the address
        undone.append(address)

    monkeypatch.setattr(cuda.Cuda, "unregister", noting)
    with lane_with_readers(device="cuda:0", capacity=SIZE, segment=4 * MIB, pinned=SIZE) as pair:
        assert pair.reader.wait_pinned(pair.lane.name, DEADLINE)
    eventually(lambda: len(undone) == 1, "it is unregistered")
