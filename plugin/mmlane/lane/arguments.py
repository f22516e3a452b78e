"""What callers pass in, checked at once: one error that says what was wanted, what was found, and an example."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from operator import index
from typing import SupportsFloat, SupportsIndex

READERS = 'a dict of reader group -> number of readers, like {"tp": 2}'


def whole(name: str, value: object, *, least: int, example: str) -> int:
    """A whole number; numpy's integers are such numbers, too. Raises TypeError, ValueError."""
    wanted = f"a whole number, {least} or more, like {example}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise wrong(name, value, wanted)
    number = index(value)
    if number < least:
        raise ValueError(f"{name}={value!r}: wanted {wanted}")
    return number


def seconds(name: str, value: object) -> float:
    """A time that is longer than none. Raises TypeError, ValueError."""
    if isinstance(value, bool | str) or not isinstance(value, SupportsFloat):
        raise wrong(name, value, "seconds, like 60.0")
    number = float(value)
    if not number > 0:  # nor is nan
        raise ValueError(f"{name}={value!r}: wanted more than 0 seconds, like 60.0")
    return number


def readers(value: object) -> dict[str, int]:
    """Readers by group. Raises TypeError, ValueError."""
    if not isinstance(value, Mapping):
        raise wrong("readers", value, READERS)
    if not value:
        raise ValueError(f"readers={{}}: wanted {READERS}, with at least one group")
    for group in value:
        if not isinstance(group, str):
            raise wrong("readers", dict(value), READERS)
    return {group: whole(f"readers[{group!r}]", number, least=1, example="2") for group, number in value.items()}


def wrong(name: str, value: object, wanted: str, *, quoted: bool = True) -> TypeError:
    """The error for a value of a wrong type. quoted: not for what may be secret, or user data."""
    what = f"{name}={reprlib.repr(value)}" if quoted else name
    return TypeError(f"{what} is of type {type(value).__name__}: wanted {wanted}")
