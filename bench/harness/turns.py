"""Whose turn it is: a drift of the machine is to meet all ways alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def turns(ways: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The round and the way; every other round goes backwards."""
    for number in range(rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            yield number, way
