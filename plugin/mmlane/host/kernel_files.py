"""Texts and numbers in the files that the kernel writes: those of /proc, and those of the control groups.

What cannot be read, or is not of the kernel's form, counts as absent.
"""

from __future__ import annotations

import os
from pathlib import Path


def text(file: Path) -> str:
    """What is in a file, of any bytes, as Python writes file names; "" when it cannot be read."""
    try:
        return os.fsdecode(file.read_bytes())
    except (OSError, ValueError):  # ValueError: no file has such a name
        return ""


def integer(word: str) -> int | None:
    """A word as a number that is not negative; None when it is none."""
    try:
        return int(word) if word.isdecimal() else None
    except ValueError:  # thousands of digits
        return None


def number(file: Path) -> int | None:
    """The number that is all there is in a file; None when that is something else."""
    return integer(text(file).strip())


def numbers(file: Path) -> dict[str, int]:
    """The numbers in a file of lines `NAME NUMBER [UNIT]`, by name."""
    lines = [line.split() for line in text(file).split("\n")]
    found = {line[0]: integer(line[1]) for line in lines if len(line) > 1}
    return {name: number for name, number in found.items() if number is not None}
