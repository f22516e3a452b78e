"""What is moved from a real GPU to the CPU lands in the lane; tests/unit has the same with a stand-in."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from bench.gpu.device import lacking
from mmlane.lane import Invitation, Reader
from mmlane.transport import from_gpu
from mmlane.transport.base import Declined, Tokenizer
from mmlane.transport.lane import Producer, Ticket
from tests.lane.harness.waiting import DEADLINE, eventually

LACKING = lacking(None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]

MIB = 1 << 20


class Processor:
    """As the engine's: processes on the GPU, and moves the result to the CPU."""

    def process_and_combine_mm_data(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to("cuda") * 2).to("cpu")


def test_it_is_copied_once_into_pinned_memory_and_sent_from_there() -> None:
    producer = Producer(Tokenizer({"tp": 1}, capacity=256 * MIB, pinned=128 * MIB))
    processor = Processor()
    from_gpu.into_lane(processor, producer)
    source = torch.rand(8, 2 * MIB)  # 64 MiB
    first = producer.put(source)
    assert isinstance(first, Declined) and first.invitation
    with Reader("tp") as reader:
        reader.join(Invitation.parse(first.invitation))
        lane = producer.lane
        assert lane is not None and lane.wait_open(DEADLINE)
        eventually(lambda: processor.process_and_combine_mm_data(source).is_pinned(), "the registration")
        moved = processor.process_and_combine_mm_data(source)
        assert moved.is_pinned() and torch.equal(moved, source * 2)
        for part in torch.split(moved, 3):
            ticket = producer.put(part)
            assert isinstance(ticket, Ticket)
            assert torch.equal(reader.take(ticket.state()["ticket"], "view"), part)
        assert lane.stats().copied_bytes == 0
        del moved, part
        eventually(lambda: lane.stats().used_bytes == 0, "the room")
        lane.close()


def test_a_process_that_uses_no_gpu_gets_no_context() -> None:
    code = """
        import torch
        from mmlane.lane import Invitation, Reader
        from mmlane.transport import from_gpu
        from mmlane.transport.base import Tokenizer
        from mmlane.transport.lane import Producer

        class Processor:
            def process_and_combine_mm_data(self, tensor):
                return tensor.to("cpu")

        producer = Producer(Tokenizer({"tp": 1}, capacity=64 << 20, pinned=32 << 20))
        processor = Processor()
        from_gpu.into_lane(processor, producer)
        declined = producer.put(torch.rand(1 << 20))
        with Reader("tp") as reader:
            reader.join(Invitation.parse(declined.invitation))
            assert producer.lane.wait_open(60)
            for _ in range(3):
                producer.put(processor.process_and_combine_mm_data(torch.rand(1 << 20)))
            assert not torch.cuda.is_initialized()
    """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True, timeout=300)
