"""Whose turn it is: a drift of the machine has to affect all ways equally."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mmlane.bench.workers import Failed, Refusal

W = TypeVar("W")
Problem = Failed | Refusal


def turns(ways: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The round and the way; every other round goes backwards."""
    for number in range(rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            yield number, way


def each(there: list[W], do: Callable[[W], object], *, backwards: bool = False) -> Iterator[tuple[W, Problem]]:
    """Do it for each; one for which that fails leaves `there`, and is returned with the reason."""
    for one in there[:: -1 if backwards else 1]:
        try:
            do(one)
        except (Failed, Refusal) as problem:
            there.remove(one)
            yield one, problem
