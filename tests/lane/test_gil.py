"""What a put copies soon, it copies without giving up the GIL: it may take 5 ms, each time, to get it back."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mmlane.lane import Lane, Reader, libc, mapping
from tests.lane.harness.waiting import DEADLINE

MIB = 1 << 20


class Other:
    """A thread that wants the GIL from `begin` on. has_run: it got it."""

    def __init__(self) -> None:
        self.has_run = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._gate.acquire()
        self.has_run = True

    def begin(self) -> None:
        self._gate.release()

    def join(self) -> None:
        self._thread.join()


@contextmanager
def another_thread() -> Iterator[Other]:
    """In here threads take the GIL from each other only where one gives it up."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    other = Other()
    try:
        yield other
    finally:
        sys.setswitchinterval(usual)
        other.join()


@pytest.mark.parametrize(("nbytes", "gives_it_up"), [(libc.BRIEF, False), (16 * libc.BRIEF, True)])
def test_only_a_long_copy_gives_up_the_gil(nbytes: int, gives_it_up: bool) -> None:
    source = torch.ones(nbytes, dtype=torch.uint8)
    room = (ctypes.c_ubyte * nbytes)()
    with another_thread() as other:
        other.begin()
        libc.copy(room, source.data_ptr(), nbytes)
        assert other.has_run == gives_it_up
    assert room[0] == room[nbytes - 1] == 1


@pytest.mark.parametrize(
    ("nbytes", "threads", "is_ours"),
    [(64 << 10, 2, True), (libc.BRIEF, 2, True), (libc.BRIEF + 1, 2, False), (libc.BRIEF + 1, 1, True)],
)
def test_torch_copies_what_its_threads_are_worth(
    nbytes: int, threads: int, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch gives up the GIL in each of its calls, of which a copy takes several."""
    copied: list[int] = []

    def copy(to: ctypes.Array[ctypes.c_ubyte], address: int, nbytes: int) -> None:
        copied.append(nbytes)
        libc.copy(to, address, nbytes)

    monkeypatch.setattr(mapping, "copy", copy)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Lane({"tp": 1}, capacity=128 * MIB) as lane, Reader("tp") as reader:
            reader.join(lane.invitation)
            assert lane.wait_open(DEADLINE)
            tensor = torch.arange(nbytes).to(torch.uint8)
            ticket = lane.put(tensor)
            assert isinstance(ticket, bytes)
            assert torch.equal(reader.take(ticket), tensor)
    finally:
        torch.set_num_threads(usual)
    assert copied == [nbytes] * is_ours
