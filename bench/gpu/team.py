"""A producer and its consumers, each a process, and the rounds they do: one load, one way, one round at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.ways import BY_IMAGE, Load, Receiver, Sender, fill, is_right, mark, receiver, sender
from bench.harness.memory import available
from bench.harness.spawned import Spawned, gather
from bench.harness.turns import Problem, each
from mmlane.bench.clock import seconds, stamp
from mmlane.bench.memory import tidy
from mmlane.bench.workers import Failed, Refusal


@dataclass(frozen=True)
class Round:
    """Seconds. put: in the producer. first: from before the first copy of any consumer until all of them are on
    their devices. again: a further copy, the slowest consumer. total: from before the put to the end of first."""

    put: float
    first: float
    again: float
    total: float


class Producer:
    """The producing process's orders. `nbytes`: the most that a load has."""

    def __init__(self, consumers: int, nbytes: int, device: Device) -> None:
        self._setting = (consumers, nbytes, device)
        self._senders: dict[str, Sender] = {}
        self._load: Load | None = None
        self._tensors: list[Tensor] = []

    def open(self, way: str) -> Any:
        """What consumers need to find it."""
        self._senders[way] = sender(way, *self._setting)
        return self._senders[way].address

    def ready(self, way: str) -> None:
        self._senders[way].ready()

    def prepare(self, load: Load, seed: int) -> None:
        """Have the tensors of this round."""
        if load != self._load:
            self._tensors = []
            tidy()
            self._tensors = [torch.empty(load.shape, dtype=load.dtype) for _ in range(load.count)]
            for tensor in self._tensors:
                fill(tensor)
            self._load = load
        for tensor in self._tensors:
            mark(tensor, seed)

    def send(self, way: str, seed: int, only: int | None = None) -> tuple[int, int, list[Any]]:
        """When it began and ended, and the messages; of one tensor alone, or of all."""
        tensors = self._tensors if only is None else self._tensors[only : only + 1]
        began = stamp()
        messages = self._senders[way].send(tensors, seed)
        return began, stamp(), messages

    def free(self, way: str) -> None:
        self._senders[way].free()

    def close(self) -> None:
        for one in self._senders.values():
            one.close()


class Consumer:
    """A consuming process's orders."""

    def __init__(self, number: int, device: Device) -> None:
        self._number = number
        self._device = device
        device.enter()
        self._receivers: dict[str, Receiver] = {}
        self._here: list[Tensor] = []
        self._there: list[Tensor] = []

    def open(self, way: str, address: Any) -> None:
        self._receivers[way] = receiver(way, address, self._number, self._device)

    def receive(self, way: str, messages: Sequence[Any]) -> None:
        self._here = self._receivers[way].receive(messages)

    def copy(self) -> tuple[int, int]:
        """When the first copy was about to be queued, and when all were on the device."""
        began = stamp()
        self._there = [self._device.copy(tensor) for tensor in self._here]
        self._device.synchronize()
        return began, stamp()

    def receive_and_copy(self, way: str, messages: Sequence[Any]) -> int:
        """Have the device copy what has just come, beside what came before; when that was about to be queued."""
        here = self._receivers[way].receive(messages)
        began = stamp()
        self._here += here
        self._there += [self._device.copy(tensor) for tensor in here]
        return began

    def finish(self) -> int:
        """When all was on the device."""
        self._device.synchronize()
        return stamp()

    def again(self, times: int) -> float:
        """Seconds for one more copy, on average."""
        began = stamp()
        for _ in range(times):
            for there, here in zip(self._there, self._here, strict=True):
                there.copy_(here, non_blocking=True)
        self._device.synchronize()
        return seconds(stamp() - began) / times

    def check(self, seed: int) -> bool:
        """Whether the right bytes are on the device."""
        return all(is_right(tensor, seed) for tensor in self._there)

    def drop(self) -> None:
        self._here, self._there = [], []

    def reserved(self) -> int:
        """Bytes that this process's allocator has on its GPU, features above all."""
        return self._device.reserved()

    def close(self) -> None:
        self.drop()
        for one in self._receivers.values():
            one.close()


class Team:
    """One producer, with its GPU where a way needs one, and a consumer for each of `devices`."""

    def __init__(self, devices: Sequence[Device], nbytes: int, device: Device) -> None:
        self._devices = devices
        self._nbytes = nbytes
        self._seed = 0
        self._addresses: dict[str, Any] = {}
        self._consumers: list[Spawned] = []
        self._producer = Spawned(Producer, len(devices), nbytes, device)
        self._producer.answer()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._consumers, self._producer):  # a pool outlives those that opened it
            worker.end()

    def offer(self, way: str) -> None:
        """Have the producer open its end. Raises Failed, Refusal."""
        if (lacks := 3 * self._nbytes - available()) > 0:
            raise Refusal(f"{lacks >> 20} MiB more host memory wanted than there is")
        self._addresses[way] = self._producer.call("open", way)

    def join(self) -> None:
        """Start the consumers."""
        self._consumers = [Spawned(Consumer, number, device) for number, device in enumerate(self._devices)]
        gather(self._consumers)

    def open(self, way: str) -> None:
        """Have the consumers open theirs. Raises Failed, Refusal."""
        self._all("open", way, self._addresses[way])
        self._producer.call("ready", way)

    def round(self, way: str, load: Load, again: int = 0) -> Round:
        """Send, receive, copy, `again` so many times, check, free. Raises Failed, Refusal."""
        self._seed += 1
        try:
            self._producer.call("prepare", load, self._seed)
            send = self._one_by_one if way == BY_IMAGE else self._all_at_once
            put, start, copies = send(way, load)
            slowest = max(self._all("again", again)) if again else 0.0
            if not all(self._all("check", self._seed)):
                raise Failed("other bytes arrived than were sent")
        finally:
            with suppress(Failed, Refusal):  # there is one on its way already, or the next round finds it
                self._all("drop")
        self._producer.call("free", way)
        begin, end = min(copy[0] for copy in copies), max(copy[1] for copy in copies)
        return Round(put, seconds(end - begin), slowest, seconds(end - start))

    def _all_at_once(self, way: str, load: Load) -> tuple[float, int, list[tuple[int, int]]]:
        """Seconds in the producer, when it began, and when each consumer began to copy and had all."""
        start, sent, messages = self._producer.call("send", way, self._seed)
        self._all("receive", way, messages)
        return seconds(sent - start), start, self._all("copy")

    def _one_by_one(self, way: str, load: Load) -> tuple[float, int, list[tuple[int, int]]]:
        """The same, where consumers copy a tensor while the producer puts the next."""
        puts: list[tuple[int, int]] = []
        begun: list[list[int]] = []
        for number in range(load.count):
            began, ended, messages = self._producer.call("send", way, self._seed, number)
            puts.append((began, ended))
            if number:
                begun.append(gather(self._consumers))
            for consumer in self._consumers:
                consumer.ask("receive_and_copy", way, messages)
        begun.append(gather(self._consumers))
        ends: list[int] = self._all("finish")
        put = sum(seconds(ended - began) for began, ended in puts)
        return put, puts[0][0], list(zip(begun[0], ends, strict=True))

    def reserved(self) -> list[int]:
        """Bytes of each consumer's allocator."""
        return self._all("reserved")

    def _all(self, order: str, *arguments: Any) -> list[Any]:
        for consumer in self._consumers:
            consumer.ask(order, *arguments)
        return gather(self._consumers)


def take_turns(
    teams: Mapping[str, Team], load: Load, rounds: int, again: int = 0
) -> tuple[dict[str, list[Round]], dict[str, Problem]]:
    """Each way's rounds, or why it has none: one of each way by turns, forwards and backwards."""
    found: dict[str, list[Round]] = {way: [] for way in teams}
    problems: dict[str, Problem] = {}
    there = list(teams)
    for number in range(rounds):
        problems |= each(
            there, lambda way: found[way].append(teams[way].round(way, load, again)), backwards=number % 2 == 1
        )
    return {way: found[way] for way in teams if way in there}, problems
