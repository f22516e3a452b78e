"""The interface as a program finds it: its names, its arguments, tasks of an event loop, and the examples."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import textwrap
import threading
from ast import PyCF_ALLOW_TOP_LEVEL_AWAIT
from collections.abc import Callable
from math import nan
from pathlib import Path
from queue import SimpleQueue
from types import FunctionType
from typing import Any

import numpy
import pytest
import torch

import mmlane.lane
from mmlane.lane import JoinRefused, Lane, Reader, memory, status
from tests.lane.harness.lane_with_readers import put, serves
from tests.lane.harness.sockets import invitation_without_lane
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

MIB = 1 << 20
DOCS = Path(__file__).parents[2] / "docs"

# --- names -------------------------------------------------------------------------------------------------


def test_all_names_are_listed_also_those_that_need_torch() -> None:
    program = """
import json, sys, mmlane.lane
listed = dir(mmlane.lane)
lazy = "torch" not in sys.modules
exec("from mmlane.lane import *")
print(json.dumps([listed, lazy, sorted(set(mmlane.lane.__all__) - set(globals()))]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    listed, lazy, missing = json.loads(done.stdout)
    assert set(mmlane.lane.__all__) <= set(listed) and lazy and missing == []


# --- arguments ---------------------------------------------------------------------------------------------

EXAMPLE = 'a dict of reader group -> number of readers, like {"tp": 2}'
WRONG: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    "a number of readers": (lambda: Lane(readers=2), TypeError, ("readers=2 is of type int", EXAMPLE)),  # type: ignore[arg-type]
    "readers without groups": (lambda: Lane(readers=["tp"]), TypeError, ("of type list", EXAMPLE)),  # type: ignore[arg-type]
    "no readers": (lambda: Lane(readers={}), ValueError, ("readers={}", EXAMPLE)),
    "a group that is none": (lambda: Lane(readers={0: 2}), TypeError, ("readers={0: 2}", EXAMPLE)),  # type: ignore[dict-item]
    "readers in words": (
        lambda: Lane(readers={"tp": "2"}),  # type: ignore[dict-item]
        TypeError,
        ("readers['tp']='2' is of type str", "a whole number, 1 or more, like 2"),
    ),
    "half a reader": (lambda: Lane(readers={"tp": 1.5}), TypeError, ("readers['tp']=1.5",)),  # type: ignore[dict-item]
    "a group without readers": (lambda: Lane(readers={"tp": 0}), ValueError, ("readers['tp']=0", "1 or more")),
    "a capacity in words": (
        lambda: Lane({"tp": 1}, capacity="4G"),  # type: ignore[arg-type]
        TypeError,
        ("capacity='4G' is of type str", "4 << 30 (4 GiB)"),
    ),
    "a capacity below nothing": (lambda: Lane({"tp": 1}, capacity=-1), ValueError, ("capacity=-1", "1 or more")),
    "no capacity": (lambda: Lane({"tp": 1}, capacity=0), ValueError, ("capacity=0",)),
    "a capacity of yes": (lambda: Lane({"tp": 1}, capacity=True), TypeError, ("capacity=True is of type bool",)),
    "more pinned than there is": (
        lambda: Lane({"tp": 1}, capacity=4 * MIB, pinned=4 * MIB + 1),
        ValueError,
        (f"pinned={4 * MIB + 1} is more than capacity={4 * MIB}",),
    ),
    "more pinned than there is by default": (
        lambda: Lane({"tp": 1}, pinned=memory.default_capacity() + 1),
        ValueError,
        (f"is more than capacity={memory.default_capacity()}",),
    ),
    "pinned below nothing": (lambda: Lane({"tp": 1}, pinned=-1), ValueError, ("pinned=-1", "0 or more")),
    "segments of nothing": (lambda: Lane({"tp": 1}, segment=0), ValueError, ("segment=0",)),
    "a time in words": (lambda: Lane({"tp": 1}, idle="1 s"), TypeError, ("idle='1 s'", "seconds, like 60.0")),  # type: ignore[arg-type]
    "a time that has passed": (
        lambda: Lane({"tp": 1}, orphan=-1),
        ValueError,
        ("orphan=-1", "more than 0 seconds"),
    ),
    "no time": (lambda: Lane({"tp": 1}, idle=nan), ValueError, ("idle=nan",)),
    "group and number mixed up": (lambda: Reader(0, "tp"), TypeError, ("group=0", 'Reader("tp", 0)')),  # type: ignore[arg-type]
    "a number in words": (lambda: Reader("tp", "0"), TypeError, ("number='0'", 'Reader("tp", 0)')),  # type: ignore[arg-type]
    "a number below nothing": (lambda: Reader("tp", -1), ValueError, ("number=-1", "0 or more")),
    "a number of yes": (lambda: Reader("tp", True), TypeError, ("number=True",)),
    "lingering in words": (lambda: Reader("tp", linger="long"), TypeError, ("linger='long'", "seconds")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "kind", "parts"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_one_clear_error_at_once(
    make: Callable[[], object], kind: type[Exception], parts: tuple[str, ...]
) -> None:
    before = threading.active_count()
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert type(caught.value) is kind and caught.value.__cause__ is None
    for part in (*parts, "wanted"):
        assert part in str(caught.value)
    assert threading.active_count() <= before


@pytest.mark.parametrize("what", ["not a tensor", [1.0], numpy.zeros(3), None])
def test_an_argument_that_is_not_a_tensor_is_an_error_and_no_refusal(what: Any, lane: Lane) -> None:
    for use in (lane.put, lane.copy):
        with pytest.raises(TypeError, match=r"tensor is of type \w+: wanted a torch\.Tensor, like torch\.zeros"):
            use(what)
    assert lane.stats().fallbacks == {}
    serves(lane)


@pytest.mark.parametrize("what", ["x", bytes, None])
def test_the_error_for_a_wrong_invitation_shows_no_secret(what: Any, lane: Lane) -> None:
    if what is bytes:
        what = bytes(lane.invitation)
    with Reader("tp") as reader:
        with pytest.raises(TypeError) as caught:
            reader.join(what)
        assert str(caught.value) == (
            f"invitation is of type {type(what).__name__}: wanted an Invitation: lane.invitation, or"
            " Invitation.parse(data) of its bytes"
        )
        serves(lane)


def test_a_ticket_of_a_wrong_type_is_an_error(lane: Lane) -> None:
    """Of the kind that fails a request, not a process: it may have come from elsewhere."""
    with (
        Reader("tp") as reader,
        pytest.raises(mmlane.lane.MalformedTicket, match=r"a ticket is bytes.*this is str"),
    ):
        reader.take("x")  # type: ignore[arg-type]


def test_switch_takes_only_a_bool(lane: Lane) -> None:
    with pytest.raises(TypeError, match="off='on' is of type str: wanted True to refuse puts"):
        lane.switch("on")  # type: ignore[arg-type]
    assert lane.state == "waiting"


def test_all_of_a_lane_can_be_pinned() -> None:
    with Lane({"tp": 1}, capacity=MIB, pinned=MIB) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        eventually(lambda: lane.stats().pinned_bytes == lane.stats().capacity_bytes, "all is committed")


# --- tasks -------------------------------------------------------------------------------------------------


def test_a_lane_and_its_reader_in_one_event_loop() -> None:
    """Which goes on while each waits for the other."""

    async def body() -> None:
        async with Lane({"tp": 1}, capacity=MIB) as lane, Reader("tp", 0) as reader:
            opened = asyncio.create_task(lane.wait_open_async(DEADLINE))
            await asyncio.sleep(0)
            assert not opened.done()
            await reader.join_async(lane.invitation, DEADLINE)
            assert await opened is True and await lane.wait_open_async() is True
            tensor = torch.arange(100)
            assert torch.equal(reader.take(put(lane, tensor)), tensor)
        assert lane.is_closed and await lane.wait_open_async() is False

    asyncio.run(body())


def test_a_task_waits_no_longer_than_its_timeout(lane: Lane) -> None:
    assert asyncio.run(lane.wait_open_async(0.01)) is False
    assert asyncio.run(lane.wait_open_async(0)) is False
    assert not lane._lifecycle._waiting


def test_a_lane_that_is_closed_wakes_the_tasks_and_threads_that_wait(lane: Lane) -> None:
    async def body() -> None:
        tasks = [asyncio.create_task(lane.wait_open_async()) for _ in range(3)]
        await asyncio.sleep(0)
        assert len(lane._lifecycle._waiting) == 4
        await asyncio.to_thread(lane.close)
        assert await asyncio.gather(*tasks) == [False] * 3

    def thread() -> None:
        assert lane.wait_open() is False

    with in_a_thread(thread):
        eventually(lambda: len(lane._lifecycle._waiting) == 1, "the thread waits")
        asyncio.run(body())
    assert not lane._lifecycle._waiting


def test_a_task_that_is_cancelled_leaves_nothing(lane: Lane) -> None:
    async def body() -> None:
        task = asyncio.create_task(lane.wait_open_async())
        await asyncio.sleep(0)
        assert len(lane._lifecycle._waiting) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = threading.active_count()
    asyncio.run(body())
    assert not lane._lifecycle._waiting and threading.active_count() == before
    serves(lane)


def test_the_lane_opens_though_a_waiting_event_loop_is_closed(lane: Lane) -> None:
    loop = asyncio.new_event_loop()
    coroutine = lane.wait_open_async()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0))
    assert len(lane._lifecycle._waiting) == 1
    loop.close()
    serves(lane)  # which opens it, and so wakes the tasks that wait
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()


def test_a_join_that_is_refused_says_so_in_the_task() -> None:
    async def body() -> None:
        async with Reader("tp") as reader:
            with pytest.raises(JoinRefused, match="no process listens there"):
                await reader.join_async(invitation_without_lane(), DEADLINE)
            with pytest.raises(TypeError, match="wanted an Invitation"):
                await reader.join_async("x")  # type: ignore[arg-type]

    asyncio.run(body())


def test_a_join_that_is_cancelled_is_given_up() -> None:
    """Its producer answers late: no member comes of it, and no thread stays."""
    gate = threading.Event()

    async def body(lane: Lane, reader: Reader) -> None:
        task = asyncio.create_task(reader.join_async(lane.invitation, DEADLINE))
        await asyncio.to_thread(eventually, lambda: joining(), "a thread waits for the producer")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def joining() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("mmlane-joining-")]

    with Lane({"tp": 1}, capacity=MIB) as lane, Reader("tp") as reader:
        lane._control.admission._welcome, welcome = (  # type: ignore[method-assign]
            lambda *words: (gate.wait(DEADLINE), welcome(*words))[1],
            lane._control.admission._welcome,
        )
        asyncio.run(body(lane, reader))
        (thread,) = joining()
        assert thread.daemon
        gate.set()
        eventually(lambda: not joining(), "the thread's end")
        assert reader.lanes() == () and lane.stats().joined_readers == {"tp": []}
        serves(lane)  # its number is free


# --- examples ----------------------------------------------------------------------------------------------


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "lane_example.py")], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"sum (\S+)\na reader's sum \1\na reader's sum \1\n1 put, ", done.stdout)


def blocks() -> dict[str, str]:
    """The Python of docs/lane.md, by its first line."""
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / "lane.md").read_text(encoding="utf-8"), re.M | re.S)
    return {block.partition("\n")[0]: block for block in found}


class Reading:
    """Readers 0 and 1, each in a thread, which do what a block of the documentation says."""

    def __init__(self, block: str, run: Callable[[str, dict[str, Any]], object] = exec) -> None:
        self.taken: list[dict[str, Any]] = []
        self._block, self._run = block, run
        self._queues: list[SimpleQueue[Any]] = []
        self._sent: list[Any] = []
        self.threads: list[threading.Thread] = []

    def send(self, what: object) -> None:
        """What the producer's block calls: the first message begins the readers, others wait for `deliver`."""
        self._sent.append(what)
        if len(self._sent) > 1:
            return
        for number in range(2):
            queue: SimpleQueue[Any] = SimpleQueue()
            queue.put(what)
            self._queues.append(queue)
            names = {"number": number, "receive": queue.get}
            self.taken.append(names)
            thread = threading.Thread(target=self._run, args=(self._block, names), daemon=True)
            self.threads.append(thread)
            thread.start()

    def deliver(self) -> None:
        """Have the readers go on, to their end."""
        for queue in self._queues:
            for what in self._sent[1:]:
                queue.put(what)
        for thread in self.threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()


def test_what_the_documentation_shows_is_so() -> None:
    """A producer and two readers; the tickets are taken once the producer is done."""
    found = blocks()
    reading = Reading(found["from mmlane.lane import Invitation, Reader"])
    tensor = torch.rand(3, 5)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(bytes(1024))
        names: dict[str, Any] = {"send": reading.send, "tensor": tensor, "socket": theirs}
        exec(found["import torch"], names)
    reading.deliver()
    assert names["lane"].is_closed and len(names["tickets"]) == 4
    for taken in reading.taken:
        assert torch.equal(taken["tensor"], tensor)


def awaiting(block: str, names: dict[str, Any]) -> None:
    """Run a block that awaits."""
    code = compile(block, "docs/lane.md", "exec", flags=PyCF_ALLOW_TOP_LEVEL_AWAIT)
    asyncio.run(FunctionType(code, names)())


def test_what_the_documentation_shows_of_event_loops_is_so() -> None:
    found = blocks()
    imports = "from mmlane.lane import Invitation, Lane, Reader\n"
    reading = Reading(imports + found['async with Reader("tp", number) as reader:'], awaiting)
    names: dict[str, Any] = {"send": reading.send, "tensor": torch.rand(3, 5)}
    awaiting(imports + found['async with Lane(readers={"tp": 2}) as lane:'], names)
    reading.deliver()
    assert names["lane"].is_closed
    for taken in reading.taken:
        assert torch.equal(taken["tensor"], names["tensor"])


def test_what_the_documentation_shows_of_watching_is_so(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "running", lambda: (lane.name,))  # lanes of other processes are not switched off
    exec(blocks()["from mmlane.lane import status"], {})
    assert lane.state == "off"


def test_the_documentation_has_no_example_that_is_not_run() -> None:
    assert len(blocks()) == 5
    doc = textwrap.dedent(mmlane.lane.__doc__ or "")
    assert "if not lane.wait_open(" in doc
