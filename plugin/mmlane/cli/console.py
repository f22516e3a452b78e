"""Where the command writes: to a terminal, or through a pipe, which has no width and whose reader may go."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

_UNWRAPPED = 100_000  # columns


class _Piped(Console):
    """Writes at once, without the spaces that fill up the rows of tables: lines can be long."""

    def print(self, *objects: Any, **options: Any) -> None:
        with self.capture() as written:
            super().print(*objects, **options)
        self.file.write(re.sub(" +$", "", written.get(), flags=re.MULTILINE))
        self.file.flush()


def console() -> Console:
    """A console on stdout. Where that is no terminal, no line is wrapped, unless COLUMNS says where."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return _Piped(highlight=False, width=None if "COLUMNS" in os.environ else _UNWRAPPED)


def is_live(one: Console) -> bool:
    """Whether what was written can be written over."""
    return sys.stdout.isatty() and one.is_terminal and not one.is_dumb_terminal


@contextmanager
def until_closed() -> Iterator[None]:
    """End the command with 0, and quietly, once its output is closed (`| head -1`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        raise typer.Exit(0) from None
