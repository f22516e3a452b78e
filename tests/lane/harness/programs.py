"""Programs of their own, as text: what a test wants to see the end of, or to be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import dedent

from tests.conftest import CHECKOUT
from tests.lane.harness.child import die_with_the_parent
from tests.lane.harness.waiting import DEADLINE


def environment() -> dict[str, str]:
    """In which a program finds what this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, sys.path)])}


@contextmanager
def program(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Python with this code; it has to be over at the end of the block, without a word on stderr.

    Its exit status has to be 3 if there is "raise" among the arguments, 0 if not.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(code), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=die_with_the_parent,
    )
    try:
        yield process
        _, errors = process.communicate(timeout=DEADLINE)
        assert errors == ""
        assert process.returncode == (3 if "raise" in args else 0)
    finally:
        process.kill()
        process.wait()


def run_beside_a_lane(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `pair`, an open lane with two readers, in a process of its own; it dies with the tests."""
    start = """
        import gc, sys, threading, torch
        from tests.lane.harness.child import die_with_the_parent
        from tests.lane.harness.payloads import random, same
        from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, lane_with_readers
        from tests.lane.harness.waiting import DEADLINE, eventually
        die_with_the_parent()
        scope = lane_with_readers(readers=2)
        pair = scope.__enter__()
    """
    return subprocess.run(
        [sys.executable, "-c", dedent(start) + dedent(code)],
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        env=environment(),
        check=False,
    )
