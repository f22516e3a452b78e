"""The five measures. Each yields its records, and has ended its processes by then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from bench.gpu.device import Device, Watcher
from bench.gpu.records import COPY
from bench.gpu.team import Round, Team, take_turns
from bench.gpu.ways import (
    BY_IMAGE,
    LANE_PAGEABLE,
    LANE_PINNED,
    PAGEABLE,
    POOL,
    POOL_AS_IT_COMES,
    SEGMENT,
    SHARED,
    TORCH_PINNED,
    Load,
)
from bench.harness.results import Record, absent
from bench.harness.sizes import GIB, MIB, size
from bench.harness.spawned import Spawned, spawned
from bench.harness.turns import Problem, each
from mmlane.bench.clock import seconds, stamp
from mmlane.bench.workers import Failed, Refusal
from mmlane.lane.cuda import Cuda
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.mapping import PAGE, Mapping

H2D = (TORCH_PINNED, PAGEABLE, SHARED, SEGMENT, LANE_PAGEABLE, LANE_PINNED)
CONCURRENT = (TORCH_PINNED, SEGMENT, LANE_PAGEABLE, LANE_PINNED)
FIRST_BYTE = (POOL, SEGMENT, LANE_PAGEABLE, LANE_PINNED, BY_IMAGE)
_AGAIN = 256 * MIB  # to be copied again, in as many copies as that takes
_MOST_AGAIN = 32

IMAGES = Load("32 images of 1280x720", (92 * 52, 3 * 2 * 14 * 14), 32, torch.float32)


@dataclass(frozen=True)
class Plan:
    """What is measured, on which devices. Sizes in bytes; `warm`: rounds that do not count; `fresh`: consumers
    started anew for `contexts`; `room`: least size of pools and lanes for `first byte`."""

    devices: Sequence[Device]
    sizes: Sequence[int] = (MIB, 8 * MIB, 64 * MIB, 256 * MIB, 700 * MIB)
    shared: int = 256 * MIB
    processes: Sequence[int] = (1, 2, 4)
    registered: Sequence[int] = (64 * MIB, 256 * MIB, GIB)
    images: Load = field(default=IMAGES)
    room: int = GIB
    warm: int = 2
    rounds: int = 9
    fresh: int = 3

    def quick(self) -> Plan:
        return replace(self, sizes=(MIB, 64 * MIB, 256 * MIB), registered=(64 * MIB, 256 * MIB), rounds=3, fresh=1)

    def rehearsal(self) -> Plan:
        """The CPU twice, as if it were two GPUs."""
        return replace(
            self, devices=[Device(0, True), Device(1, True)], sizes=(64 << 10, MIB), shared=MIB, processes=(1, 2),
            registered=(MIB,), images=replace(IMAGES, label="4 little images", shape=(64, 1176), count=4),
            room=4 * MIB, warm=1, rounds=2, fresh=1,
        )  # fmt: skip


def _words(nbytes: int) -> Load:
    return Load(size(nbytes), (nbytes // 8,))


def _room(load: Load) -> int:
    """For its tensors in whole pages, and some more."""
    return load.nbytes + load.count * PAGE + 4 * MIB


def contexts(plan: Plan) -> Iterator[Record[str]]:
    """GPU memory that a consumer adds."""
    producing, consuming = plan.devices[0], plan.devices[-1]
    case = f"producer on GPU {producing.index}, consumer on GPU {consuming.index}"
    ways = [POOL_AS_IT_COMES, POOL, LANE_PINNED]
    if producing.index == consuming.index:
        ways.remove(POOL)
        reason = "two GPUs wanted: with one, the handle's device is the consumer's own already"
        yield absent("contexts", case, POOL, Refusal(reason))
    load = _words(MIB)
    found: dict[str, list[dict[int, int]]] = {way: [] for way in ways}
    with spawned(Watcher, plan.devices) as watcher:
        for _ in range(plan.fresh):
            for way, problem in each(
                ways, lambda way: found[way].append(_added(way, load, watcher, producing, consuming))
            ):
                yield absent("contexts", case, way, problem)
    for way in ways:
        figures = {"MiB in all": [sum(added.values()) / MIB for added in found[way]]}
        for device in dict.fromkeys((consuming, producing)):
            figures[f"MiB on GPU {device.index}"] = [added[device.index] / MIB for added in found[way]]
        yield Record("contexts", case, way, figures=figures)


def _added(way: str, load: Load, watcher: Spawned, producing: Device, consuming: Device) -> dict[int, int]:
    """Bytes on each GPU that one consumer adds, its allocator's left out."""
    with Team([consuming], _room(load), producing) as team:
        team.offer(way)
        before = watcher.call("used")
        team.join()
        team.open(way)
        team.round(way, load)
        after = watcher.call("used")
        (own,) = team.reserved()
    return {index: after[index] - before[index] - own * (index == consuming.index) for index in after}


def h2d(plan: Plan) -> Iterator[Record[str]]:
    """GB/s to the device, by size."""
    room = _room(_words(max(plan.sizes)))
    with Team(plan.devices[:1], room, plan.devices[0]) as team:
        team.join()
        ways, problems = _opened(team, H2D)
        for load in map(_words, plan.sizes):
            again = min(max(_AGAIN // load.nbytes, 1), _MOST_AGAIN)

            def figures(rounds: Sequence[Round], nbytes: int = load.nbytes) -> dict[str, list[float]]:
                counted = rounds[plan.warm :]
                return {
                    "GB/s": [nbytes / one.first / 1e9 for one in counted],
                    "GB/s again": [nbytes / one.again / 1e9 for one in counted],
                }

            yield from _records("h2d", load.label, load, plan, ways, problems, figures, again)


def concurrent(plan: Plan) -> Iterator[Record[str]]:
    """GB/s of several processes together."""
    load = _words(plan.shared)
    for processes in plan.processes:
        devices = [plan.devices[number % len(plan.devices)] for number in range(processes)]
        with Team(devices, _room(load), plan.devices[0]) as team:
            team.join()
            ways, problems = _opened(team, CONCURRENT)

            def figures(rounds: Sequence[Round], nbytes: int = processes * load.nbytes) -> dict[str, list[float]]:
                return {"GB/s": [nbytes / one.first / 1e9 for one in rounds[plan.warm :]]}

            case = f"{load.label}, {processes} process{'es' * (processes > 1)}"
            yield from _records("concurrent", case, load, plan, ways, problems, figures)


def registration(plan: Plan) -> Iterator[Record[str]]:
    """Seconds per GiB to pin and unpin."""
    found: dict[tuple[int, str], list[float]] = {}
    try:
        with spawned(Registrar, plan.devices[0]) as worker:
            for number in range(1 + plan.rounds):
                for nbytes in plan.registered:
                    for pages in ("fresh", "populated"):
                        for what, took in worker.call("measure", nbytes, pages == "populated").items():
                            way = what if what == COPY else f"{what}, {pages}"
                            found.setdefault((nbytes, way), []).extend([took] if number else [])
    except (Failed, Refusal) as problem:
        yield absent("registration", "all", "register", problem)
    for (nbytes, way), times in found.items():
        if not times:
            continue
        figures = {"s/GiB": [took * GIB / nbytes for took in times]}
        yield Record("registration", size(nbytes), way, figures=figures)


class Registrar:
    """Pins shared mappings as the lane's readers do (mmlane.lane.cuda); a rehearsal fills page tables instead."""

    def __init__(self, device: Device) -> None:
        self._device = device
        device.enter()

    def measure(self, nbytes: int, populated: bool) -> dict[str, float]:
        """Seconds for each step."""
        pageable = torch.ones(nbytes, dtype=torch.uint8)
        there = self._device.copy(pageable)
        self._device.synchronize()
        times = [stamp()]
        there.copy_(pageable, non_blocking=True)
        self._device.synchronize()
        times.append(stamp())
        file = Descriptor(os.memfd_create("mmlane-bench"))
        os.ftruncate(file.fd, nbytes)
        mapping = Mapping(file.fd, nbytes, writable=True)
        if populated:
            os.posix_fallocate(file.fd, 0, nbytes)
            if not mapping.populate(0, nbytes):
                raise Refusal("MADV_POPULATE_WRITE wanted: Linux 5.14")
        for step in self._steps(mapping):
            before = stamp()
            step()
            times += [before, stamp()]
        took = [seconds(end - begin) for begin, end in zip(times[::2], times[1::2], strict=True)]
        return dict(zip((COPY, "register", "unregister"), took, strict=True))

    def _steps(self, mapping: Mapping) -> Sequence[Callable[[], object]]:
        if self._device.rehearse:
            return [lambda: mapping.populate(0, mapping.nbytes), lambda: None]
        cuda = Cuda(self._device.index)
        return [
            lambda: cuda.register(mapping.address, mapping.nbytes),
            lambda: cuda.unregister(mapping.address),
        ]

    def close(self) -> None: ...


def first_byte(plan: Plan) -> Iterator[Record[str]]:
    """From the producer's CPU to the consumer's GPU, all in."""
    load, room = plan.images, max(plan.room, _room(plan.images))
    producing = plan.devices[0]
    for consuming in plan.devices[:2]:
        case = f"{load.label}, GPU {consuming.index}"
        gpu_bytes: dict[str, int] = {}
        teams: dict[str, Team] = {}
        with ExitStack() as scope:
            watcher = scope.enter_context(spawned(Watcher, plan.devices))

            def start(way: str) -> None:
                before = watcher.call("used")  # noqa: B023 - done before the next
                team = scope.enter_context(Team([consuming], room, producing))  # noqa: B023
                team.offer(way)
                team.join()
                team.open(way)
                team.round(way, load)
                (own,) = team.reserved()
                gpu_bytes[way] = sum(watcher.call("used").values()) - sum(before.values()) - own  # noqa: B023
                teams[way] = team  # noqa: B023

            problems = dict(each(list(FIRST_BYTE), start))
            found, failed = take_turns(teams, load, plan.warm + plan.rounds)
        for way, rounds in found.items():
            figures = {
                "ms": [one.total * 1e3 for one in rounds[plan.warm :]],
                "put ms": [one.put * 1e3 for one in rounds[plan.warm :]],
                "GPU MiB": [gpu_bytes[way] / MIB],
                "host pinned MiB": [room / MIB if way in (LANE_PINNED, BY_IMAGE) else 0.0],
            }
            yield Record("first byte", case, way, figures=figures)
        for way, problem in (problems | failed).items():
            yield absent("first byte", case, way, problem)


def _opened(team: Team, ways: Sequence[str]) -> tuple[dict[str, Team], dict[str, Problem]]:
    """The ways that could be opened, and why the others could not."""

    def both_ends(way: str) -> None:
        team.offer(way)
        team.open(way)

    there = list(ways)
    problems = dict(each(there, both_ends))
    return dict.fromkeys(there, team), problems


def _records(
    measure: str,
    case: str,
    load: Load,
    plan: Plan,
    ways: dict[str, Team],
    problems: dict[str, Problem],
    figures: Callable[[Sequence[Round]], dict[str, list[float]]],
    again: int = 0,
) -> Iterator[Record[str]]:
    found, failed = take_turns(ways, load, plan.warm + plan.rounds, again)
    for way, problem in (problems | failed).items():
        yield absent(measure, case, way, problem)
    for way, rounds in found.items():
        yield Record(measure, case, way, figures=figures(rounds))


MEASURES: dict[str, Callable[[Plan], Iterator[Record[str]]]] = {
    "contexts": contexts,
    "h2d": h2d,
    "concurrent": concurrent,
    "registration": registration,
    "first byte": first_byte,
}
