"""What a lane's producer feels of processes that may not join: python -m bench.rejected_peers

A tokenizer's loop is played here by Python work and puts of 64 KiB in turn. Beside it another process connects to
the lane many times a second, without the secret: silent, with a wrong proof, or with bytes that are no message.
Slices with and without it take turns; the table has what each kind did to the loop, as a ratio to the slices
without.
"""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import statistics
import time
from contextlib import suppress
from multiprocessing.synchronize import Event

import torch

from bench.harness import command, tables
from bench.harness.tables import Grid
from mmlane.lane import Lane, Reader, Refused, protocol

KINDS = ("silent", "wrong proof", "nonsense")
UNIT = 20_000  # steps of Python work between two puts: about half a millisecond


def connect(name: str, kind: str, a_second: float, up: Event, on: Event, end: Event) -> None:
    """Connect to a lane so many times a second, while `on` is set. `up`: this process has started."""
    messages = {
        "silent": b"",
        "wrong proof": protocol.hello(secrets.token_bytes(32), "tp", 0, "nonce"),
        "nonsense": b"\xff" * 100,
    }
    held: list[socket.socket] = []
    up.set()
    while not end.is_set():
        on.wait(1.0)
        due = time.monotonic()
        while on.is_set():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.setblocking(False)
            with suppress(OSError):  # the queue is full
                connection.connect(f"\0{name}")
                if messages[kind]:
                    connection.send(messages[kind], socket.MSG_NOSIGNAL)
            held.append(connection)
            if len(held) > 100:
                held.pop(0).close()
            due += 1 / a_second
            time.sleep(max(due - time.monotonic(), 0.0))


def loop(lane: Lane, reader: Reader, seconds: float) -> tuple[float, list[float]]:
    """Units of work a second, and the seconds of each put."""
    tensor = torch.zeros(64 << 10, dtype=torch.uint8)
    began, units, puts = time.perf_counter(), 0, []
    while (now := time.perf_counter()) < began + seconds:
        ticket = lane.put(tensor)
        puts.append(time.perf_counter() - now)
        assert not isinstance(ticket, Refused), ticket
        reader.take(ticket, "view")
        for _ in range(UNIT):
            pass
        units += 1
    return units / (time.perf_counter() - began), puts


def main() -> None:
    parser = command.parser("rejected_peers", __doc__)
    parser.add_argument("--a-second", type=float, default=1000.0)
    parser.add_argument("--slices", type=int, default=10)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with Lane({"tp": 1}, idle=3600) as lane, Reader("tp", 0) as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(30)
        loop(lane, reader, 1.0)
        for kind in KINDS:
            up, on, end = (spawn.Event() for _ in range(3))
            process = spawn.Process(target=connect, args=(lane.name, kind, arguments.a_second, up, on, end))
            process.start()
            up.wait()
            work: dict[bool, list[float]] = {False: [], True: []}
            puts: dict[bool, list[float]] = {False: [], True: []}
            before = lane.stats().rejected_peers
            for turn in range(2 * arguments.slices):
                there = bool(turn % 2)
                (on.set if there else on.clear)()
                units, seconds = loop(lane, reader, 1.0)
                work[there].append(units)
                puts[there] += seconds
            on.clear()
            end.set()
            process.join()
            rejected = lane.stats().rejected_peers - before
            figures = [statistics.median(work[there]) for there in (True, False)]
            medians = [statistics.median(puts[there]) * 1e6 for there in (True, False)]
            worst = [statistics.quantiles(puts[there], n=100)[98] * 1e6 for there in (True, False)]
            row = [
                f"{arguments.a_second:.0f} a second, {kind}",
                *(
                    text
                    for values, digits in ((figures, 0), (medians, 1), (worst, 1))
                    for text in (f"{values[0]:.{digits}f}", f"{values[0] / values[1]:.2f}")
                ),
                f"{rejected / arguments.slices:.0f} a second",
            ]
            rows.append(row)
    headings = ("peers", "work a second", "x without", "put, us", "x without", "99th, us", "x without", "rejected")
    tables.render([Grid("A lane's producer", headings, rows)], tables.console())


if __name__ == "__main__":
    main()
