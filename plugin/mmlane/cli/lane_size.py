"""How large the lane of an engine started now would be, and whether that suits this machine."""

from __future__ import annotations

from mmlane import host
from mmlane.cli.units import size
from mmlane.problem import Problem
from mmlane.settings import OF_FIELD, PINNED, Settings

_SMALLER = (4096, 1024, 256, 64)  # MiB, to be tried where a quarter of the memory cannot be had


def capacity(chosen: Settings, memory: host.Memory | None) -> int | None:
    """What the lanes may hold, in bytes; None where that depends on a machine that was not asked about."""
    if chosen.capacity is not None or memory is None:
        return chosen.capacity
    return memory.lane_capacity()


def pinned(chosen: Settings, memory: host.Memory | None) -> int | None:
    """What of that ranks on CUDA pin: no more than there is; None as above."""
    most = capacity(chosen, memory)
    return None if most is None else min(PINNED if chosen.pinned is None else chosen.pinned, most)


def described(chosen: Settings, memory: host.Memory | None) -> tuple[str, str]:
    """Capacity and pinned memory for a person."""
    if not has_lane(chosen):
        return "not used: no lane", "not used: no lane"
    if chosen.capacity is not None:
        most = f"{size(chosen.capacity)} for each tokenizer worker"
    else:
        most = "a quarter of the memory, for all tokenizer workers"
        most = most if memory is None else f"{size(memory.lane_capacity())}, {most}"
    if chosen.pinned is None:
        return most, f"{size(pinned(chosen, memory) or PINNED)} on CUDA, for all tokenizer workers"
    if chosen.pinned == 0:
        return most, "nothing; features can be written to in place"
    return most, f"{size(chosen.pinned)} on CUDA, for each tokenizer worker"


def problems(chosen: Settings, memory: host.Memory) -> list[Problem]:
    """Whether a lane of that size can be made here, which is tried."""
    wanted = capacity(chosen, memory)
    why = host.room_problem(wanted) if wanted is not None and has_lane(chosen) else ""
    if not why:
        return []
    follows = f"cannot be made here ({why}), so features go by shared-memory segments"
    variable, quarter = OF_FIELD["capacity"], memory.lane_capacity()
    if chosen.capacity is not None and not host.room_problem(quarter):
        what = f"a lane with {_set(variable, chosen.capacity)} {follows}; set it to less, or for {size(quarter)}:"
        return [Problem(what, f"unset {variable}")]
    named = (
        f"a lane of {size(quarter)}, a quarter of the memory,"
        if chosen.capacity is None
        else f"a lane with {_set(variable, chosen.capacity)}"
    )
    if fits := next((mib for mib in _SMALLER if not host.room_problem(mib << 20)), None):
        return [Problem(f"{named} {follows}; raise `ulimit -v`, or set", f"{variable}={fits}")]
    what = f"{named} {follows}, nor can a smaller one; raise `ulimit -v`, or do without a lane:"
    return [Problem(what, "MMLANE=backport")]


def notes(chosen: Settings, memory: host.Memory, *, gpu: bool) -> list[str]:
    """Sizes that this machine cannot fill. `gpu`: whether it has one, so that pinned memory matters by default."""
    wanted = capacity(chosen, memory)
    if wanted is None or not has_lane(chosen):
        return []
    found = []
    if chosen.capacity is not None and wanted > memory.bound and not problems(chosen, memory):
        found.append(
            f"{_set(OF_FIELD['capacity'], wanted)} is more than the {size(memory.bound)} of memory that this"
            " machine or control group has: a lane never gets that large, and features for which there is no"
            " memory go by shared-memory segments"
        )
    return found + _pinned_notes(chosen, memory, wanted, gpu=gpu)


def _pinned_notes(chosen: Settings, memory: host.Memory, most: int, *, gpu: bool) -> list[str]:
    if chosen.pinned is None and not gpu:
        return []
    wanted, variable = pinned(chosen, memory) or 0, OF_FIELD["pinned"]
    if wanted > memory.available:
        what = (
            f"{size(wanted)} of pinned memory by default"
            if chosen.pinned is None
            else _set(variable, chosen.pinned)
        )
        return [
            f"{what}, but only {size(memory.available)} are available now: on CUDA, features may be copied from"
            f" pageable memory, which is slower; set {variable} to less, or 0"
        ]
    if chosen.pinned is not None and chosen.pinned > most:
        return [
            f"{_set(variable, chosen.pinned)} is more than the lane's capacity of {size(most)}: on CUDA, all of it"
            " is pinned"
        ]
    return []


def has_lane(chosen: Settings) -> bool:
    """Whether the settings ask for a lane."""
    return chosen.mode == "lane" and "lane" not in chosen.disable


def _set(variable: str, nbytes: int) -> str:
    return f"{variable}={nbytes >> 20} ({size(nbytes)})"
