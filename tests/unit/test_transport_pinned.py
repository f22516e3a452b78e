"""MMLANE_PINNED_MB above the capacity, which the lane itself refuses: the engine gets a lane all the same."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")

from mmlane.lane import Reader, memory  # noqa: E402
from mmlane.transport.base import Declined, Tokenizer  # noqa: E402
from mmlane.transport.lane import Producer  # noqa: E402
from tests.lane.harness.waiting import DEADLINE, eventually  # noqa: E402

MIB = 1 << 20


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records if "MMLANE_PINNED_MB" in (line := record.getMessage())]


def test_no_more_is_pinned_than_there_is_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmlane")
    producer = Producer(Tokenizer({"dp0": 1}, 8 * MIB, pinned=64 * MIB))
    for _ in range(2):
        answer = producer.put(torch.ones(9))
        assert isinstance(answer, Declined) and answer.cause == "not_open"
    lane = producer.lane
    assert lane is not None
    with Reader("dp0", 0) as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        eventually(lambda: lane.stats().pinned_bytes == 8 * MIB, "all of it is committed")
    assert lines(caplog) == [
        "mmlane: all 8 MiB of the lane are pinned: MMLANE_PINNED_MB is 64, by setting or by default, and the"
        " lane's capacity (MMLANE_CAPACITY_MB) is less"
    ]


@pytest.mark.parametrize("pinned", [0, 4 * MIB, 8 * MIB])
def test_what_fits_needs_no_line(pinned: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmlane")
    producer = Producer(Tokenizer({"dp0": 1}, 8 * MIB, pinned=pinned))
    producer.put(torch.ones(9))
    assert producer.state == "opening" and lines(caplog) == []


def test_a_lane_of_the_machines_default_size_is_no_exception() -> None:
    producer = Producer(Tokenizer({"dp0": 1}, pinned=memory.default_capacity() + 1))
    producer.put(torch.ones(9))
    assert producer.state == "opening"
