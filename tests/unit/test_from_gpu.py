"""What the engine moves from a GPU to the CPU lands in the lane. The GPU is a stand-in; see also tests/gpu."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mmlane.lane import Invitation, Lane, Reader
from mmlane.transport import from_gpu
from mmlane.transport.base import Declined, Tokenizer
from mmlane.transport.lane import Producer, Ticket
from mmlane.transport.samples import Samples
from tests.lane.harness.fake_cuda import FakeStream
from tests.lane.harness.waiting import DEADLINE, eventually

WORDS = 100_000  # of a feature; more than travels inside of a request


class Processor:
    """As the engine's: moves what it has made to the CPU, somehow."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor.to("cpu")) -> None:
        self.move = move

    def process_and_combine_mm_data(self, tensor: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.move(tensor * scale)


@dataclass
class Ends:
    """A tokenizer's end of a lane that is open, and a rank's."""

    producer: Producer
    lane: Lane
    reader: Reader

    def put(self, tensor: torch.Tensor, samples: Samples | None = None) -> torch.Tensor:
        """What a rank gets of it."""
        payload = self.producer.put(tensor, samples)
        assert isinstance(payload, Ticket), payload
        return self.reader.take(payload.state()["ticket"], "view")


@pytest.fixture
def ends() -> Iterator[Ends]:
    producer = Producer(Tokenizer({"tp": 1}, capacity=64 << 20))
    first = producer.put(torch.zeros(WORDS))
    assert isinstance(first, Declined) and first.invitation
    with Reader("tp") as reader:
        reader.join(Invitation.parse(first.invitation))
        lane = producer.lane
        assert lane is not None and lane.wait_open(DEADLINE)
        yield Ends(producer, lane, reader)
        lane.close()


@pytest.fixture(autouse=True)
def all_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_gpu, "has_context", lambda: True)
    monkeypatch.setattr(from_gpu, "is_on_gpu", lambda tensor: True)


def processed(ends: Ends, tensor: torch.Tensor, processor: Processor | None = None) -> torch.Tensor:
    processor = processor or Processor()
    from_gpu.into_lane(processor, ends.producer)
    return processor.process_and_combine_mm_data(tensor, scale=2.0)


@pytest.mark.parametrize(
    "move",
    [
        lambda tensor: tensor.to("cpu"),
        lambda tensor: tensor.to(torch.device("cpu")),
        lambda tensor: tensor.to(device="cpu"),
        lambda tensor: tensor.cpu(),
    ],
)
def test_it_is_copied_once_and_then_published_view_by_view(ends: Ends, move: Any) -> None:
    source = torch.rand(8, WORDS)
    moved = processed(ends, source, Processor(move))
    assert torch.equal(moved, source * 2)
    parts = torch.split(moved, [3, 1, 4])
    assert all(torch.equal(ends.put(part), part) for part in parts)
    stats = ends.lane.stats()
    assert (stats.copied_bytes, stats.puts, stats.shared_puts, stats.extents) == (0, 3, 2, 1)
    del moved, parts
    eventually(lambda: ends.lane.stats().used_bytes == 0, "the room")


def test_samples_share_it(ends: Ends) -> None:
    moved = processed(ends, torch.rand(WORDS))
    samples = Samples(3)
    for _ in range(3):
        samples.expect([moved])
        assert torch.equal(ends.put(moved, samples), moved)
    samples.close()
    stats = ends.lane.stats()
    assert (stats.copied_bytes, stats.puts, stats.extents) == (0, 3, 1)


@pytest.mark.parametrize(
    ("source", "move"),
    [
        (torch.rand(100), lambda tensor: tensor.cpu()),  # travels inside of its request
        (torch.rand(WORDS, 2).t(), lambda tensor: tensor.cpu()),
        (torch.rand(WORDS), lambda tensor: tensor.to("cpu", torch.float64)),
        (torch.rand(WORDS), lambda tensor: tensor.to(torch.float64)),
        (torch.rand(WORDS), lambda tensor: tensor.to("cpu", copy=True)),
        (torch.rand(WORDS), lambda tensor: tensor.clone()),
        (torch.rand(WORDS).requires_grad_(), lambda tensor: tensor.cpu()),
    ],
)
def test_all_else_is_left_to_torch(ends: Ends, source: torch.Tensor, move: Any) -> None:
    moved = processed(ends, source, Processor(move))
    assert torch.equal(moved, move(source * 2)) and moved.stride() == move(source * 2).stride()
    assert ends.lane.stats().extents == 0


def test_what_is_on_the_cpu_stays_where_it_is(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_gpu, "is_on_gpu", lambda tensor: tensor.is_cuda)
    processed(ends, torch.rand(WORDS))
    assert ends.lane.stats().extents == 0


def test_no_ticket_and_no_return_before_the_bytes_are_there(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    stream.stands_still = True
    is_waiting = threading.Event()

    def fetch(tensor: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        done = threading.Event()
        stream.do(lambda: room.copy_(tensor))
        stream.do(done.set)
        is_waiting.set()
        assert done.wait(DEADLINE)
        return room

    monkeypatch.setattr(from_gpu, "fetch", fetch)
    source = torch.rand(WORDS)
    with ThreadPoolExecutor(1) as executor:
        processing = executor.submit(lambda: ends.put(processed(ends, source)))
        assert is_waiting.wait(DEADLINE)
        stats = ends.lane.stats()
        assert not processing.done() and (stats.tickets, stats.extents) == (0, 1)
        stream.run()
        assert torch.equal(processing.result(DEADLINE), source * 2)


def test_the_real_copy_waits_for_the_device() -> None:
    asked: list[Any] = []

    class Room:
        def copy_(self, *args: Any, **kwargs: Any) -> None:
            asked.append((args, kwargs))

    tensor = torch.ones(1)
    from_gpu.fetch(tensor, cast("torch.Tensor", Room()))
    assert asked == [((tensor,), {})]  # non_blocking=True would not wait


def test_one_that_is_given_up_gives_its_room_back(ends: Ends) -> None:
    moved = processed(ends, torch.rand(WORDS))
    assert ends.lane.stats().extents == 1
    del moved
    assert ends.lane.stats().extents == 0


def test_without_room_it_goes_as_without_us(ends: Ends) -> None:
    full = processed(ends, torch.rand(12_000_000))  # 46 MiB of 64
    moved = processed(ends, torch.rand(6_000_000))
    assert (ends.lane.stats().extents, full.numel(), moved.numel()) == (1, 12_000_000, 6_000_000)
    assert ends.lane.stats().fallbacks == {"not_open": 1}  # it counts when it is put


def test_a_lane_that_is_not_there_yet(ends: Ends) -> None:
    """The first feature is put as it comes: the lane is made by the thread that puts."""
    producer = Producer(Tokenizer({"tp": 1}, capacity=64 << 20))
    processor = Processor()
    from_gpu.into_lane(processor, producer)
    assert torch.equal(processor.process_and_combine_mm_data(torch.ones(WORDS)), torch.ones(WORDS))
    assert producer.lane is None


def test_an_error_of_ours_is_one_line(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensor: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("made up")

    monkeypatch.setattr(from_gpu, "fetch", fail)
    caplog.set_level(logging.WARNING)
    source = torch.rand(WORDS)
    assert torch.equal(processed(ends, source), source * 2)
    assert any("made up" in record.getMessage() for record in caplog.records)
    gc.collect()
    assert ends.lane.stats().extents == 0


def test_an_error_of_the_engine_is_the_engines(ends: Ends) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise ValueError("of the engine")

    with pytest.raises(ValueError, match="of the engine"):
        processed(ends, torch.rand(WORDS), Processor(fail))
    processed(ends, torch.rand(WORDS))  # all is as before


def test_without_cuda_nothing_is_looked_at(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(from_gpu, "has_context", lambda: False)
    monkeypatch.setattr(from_gpu, "is_on_gpu", seen.append)
    processed(ends, torch.rand(WORDS))
    assert not seen and ends.lane.stats().extents == 0


def test_the_real_question_makes_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert from_gpu.has_context() is torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


class Caching(Processor):
    """As those that prepare media for a cache, or for the requests alone."""

    def __init__(self, is_enabled: bool) -> None:
        super().__init__()
        self.mm_preprocess_cache = SimpleNamespace(enabled=is_enabled)

    def prepare_artifact_batch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()


@pytest.mark.parametrize("is_enabled", [False, True])
def test_what_a_cache_keeps_takes_no_room(ends: Ends, is_enabled: bool) -> None:
    processor = Caching(is_enabled)
    moved = [processed(ends, torch.ones(WORDS), processor), processor.prepare_artifact_batch(torch.ones(WORDS))]
    assert all(tensor.numel() == WORDS for tensor in moved)
    assert ends.lane.stats().extents == (1 if is_enabled else 2)


def test_a_processor_that_has_no_such_method_is_left_alone(ends: Ends) -> None:
    processor = object()
    from_gpu.into_lane(processor, ends.producer)


def test_the_processor_is_not_kept(ends: Ends) -> None:
    processor = Processor()
    from_gpu.into_lane(processor, ends.producer)
    gone = weakref.ref(processor)
    gc.disable()
    try:
        del processor
        assert gone() is None
    finally:
        gc.enable()
