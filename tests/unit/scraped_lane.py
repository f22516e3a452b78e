"""A tokenizer's lane and a rank without an engine, and a /metrics of theirs at the port that is the argument.

Each line on standard input is the name of a step; "done" on standard output says that it has been taken.
"""

from __future__ import annotations

import sys

import torch
from prometheus_client import start_http_server

from mmlane import log
from mmlane.lane import Reader
from mmlane.transport import metrics
from mmlane.transport.base import Declined, Tokenizer
from mmlane.transport.lane import Producer, Ticket
from tests.lane.harness.waiting import DEADLINE

MIB = 1 << 20
CAPACITY, FEATURE = 8 * MIB, torch.ones(MIB, dtype=torch.uint8)


class Steps:
    """What a test has it do."""

    def __init__(self) -> None:
        self.meter = metrics.Meter(self)
        self.producer = Producer(Tokenizer({"dp0": 1}, CAPACITY, watch=self.meter.watch))
        self.reader = Reader("dp0", 0)
        self.meter.begin(lambda: self.producer.state, "lane")
        self.out: list[Ticket] = []

    def first_feature(self) -> None:
        """The lane is made, and the rank has not joined."""
        assert self.put() == "not_open"

    def join(self) -> None:
        lane = self.producer.lane
        assert lane is not None
        self.reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)

    def features(self) -> None:
        """Some that the rank takes and lets go."""
        for _ in range(20):
            assert self.put() == ""
            self.reader.take(self.out.pop().ticket)

    def burst(self) -> None:
        """More than there is room for, and the rank takes none."""
        while not (cause := self.put()):
            pass
        assert cause == "full"

    def take(self) -> None:
        """The rank takes and lets go what there is."""
        while self.out:
            self.reader.take(self.out.pop().ticket)

    def error(self) -> None:
        log.failed("put", RuntimeError("injected"), "it is a test")

    def end(self) -> None:
        """The rank ends, and the lane with it."""
        self.reader.close()

    def put(self) -> str:
        """Why a feature did not go by lane; else empty."""
        payload = self.producer.put(FEATURE)
        if isinstance(payload, Declined):
            return payload.cause
        payload.state()  # as when it is sent
        self.out.append(payload)
        return ""


def main() -> None:
    start_http_server(int(sys.argv[1]), "127.0.0.1", metrics.REGISTRY)
    steps = Steps()
    print("done", flush=True)
    for line in sys.stdin:
        getattr(steps, line.strip())()
        print("done", flush=True)


if __name__ == "__main__":
    main()
