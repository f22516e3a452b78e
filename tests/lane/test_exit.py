"""The interpreter's end: a program that uses the lane correctly ends without output, whatever it still holds.

Python takes modules apart while objects are still alive, so a finalizer that looks something up in its module may
find None there. Which of them goes first differs from run to run.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import mmlane  # noqa: E402
import mmlane_patches  # noqa: E402
from mmlane.lane import Invitation, Refused  # noqa: E402
from tests.lane.harness import kernel  # noqa: E402
from tests.lane.harness.payloads import Sent  # noqa: E402
from tests.lane.harness.peers import Company, Producing, Reading, hears_of_the_end, refused  # noqa: E402
from tests.lane.harness.programs import program  # noqa: E402
from tests.lane.harness.waiting import eventually  # noqa: E402

SHM = Path("/dev/shm")

# Imports what is slow to import, then forks for each program that it is asked to run. The child comes to the end
# of this very script, so that its interpreter ends as that of any program; what it says on stderr, or its resource
# tracker does after it, comes through a pipe that is read to its end.
RUNNER = """
import json, os, sys
import torch, mmlane.lane.producer, mmlane.lane.reader, mmlane.transport.scheduler_side
import mmlane.transport.tokenizer_side
for line in sys.stdin:
    program, late = json.loads(line)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(theirs, 2)
        os.close(ours)
        os.close(theirs)
        break
    os.close(theirs)
    with open(ours, errors="replace") as pipe:
        said = pipe.read()
    print(json.dumps([pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
else:
    os._exit(0)
del ours, theirs, pid, line, json, os
exec(program)
if late:
    sys.modules["os"].held = [globals().get(name) for name in ("lane", "reader", "x", "y", "producer", "held")]
"""

LANE = """
import torch
from mmlane.lane import Lane, Reader
lane = Lane({"tp": 1}, capacity=64 << 20)
reader = Reader("tp")
reader.join(lane.invitation)
assert lane.wait_open(60)
"""
POINTER = """
import pickle
import torch
from mmlane.transport.pointer import ShmPointerMMData as Pointer
def sent(pointer):
    return pickle.dumps(pointer.__getstate__())
def received(message):
    pointer = Pointer()
    pointer.__setstate__(pickle.loads(message))
    return pointer
"""
TICKET = (
    POINTER
    + """
from types import SimpleNamespace
from mmlane.transport import pointer, scheduler_side, tokenizer_side
from mmlane.transport.base import Scheduler, Tokenizer
from mmlane.transport.chain import Chain
scheduler_side._become(scheduler_side.SchedulerSide(Chain(Scheduler("tp", 0))))
lane = tokenizer_side.TokenizerSide(Tokenizer({"tp": 1}, 64 << 20))
producer = lane.producer
manager = SimpleNamespace(**{tokenizer_side.SIDE: lane})
with tokenizer_side.sending(manager, None):
    assert Pointer(torch.zeros(100_000)).invitation
    pointer.slot.chain.join(bytes(producer.lane.invitation))
    assert producer.lane.wait_open(60)
    held = Pointer(torch.zeros(100_000))
assert held.payload.ticket
"""
)

PROGRAMS = {
    "nothing taken": LANE,
    "closed": LANE + "reader.close()\nlane.close()",
    "closed, and all threads have ended": LANE
    + "import threading\nreader.close()\nlane.close()\nfor x in threading.enumerate()[1:]: x.join()",
    "held": LANE + "x = reader.take(lane.put(torch.zeros(100_000)))",
    "held as a view": LANE + "x = reader.take(lane.put(torch.zeros(100_000)), 'view').numpy()",
    "held and closed": LANE + "x = reader.take(lane.put(torch.zeros(100_000)))\nreader.close()\nlane.close()",
    "held in a cycle": LANE + "x = [reader.take(lane.put(torch.zeros(100_000)))]\nx.append(x)",
    "reserved": LANE + "x = lane.reserve((100_000,), torch.float32)\ny = x.publish(x.tensor[1:])",
    "reserved, and its array held": LANE
    + "x = lane.reserve((100_000,), torch.float32).tensor.numpy()\nlane.close()\nx[:] = 1",
    "not taken": LANE + "x = lane.put(torch.zeros(100_000))",
    "read by a finalizer": LANE
    + """
class Last:
    def __init__(self, tensor): self.tensor = tensor
    def __del__(self): assert self.tensor.sum() == 100_000
x = Last(reader.take(lane.put(torch.ones(100_000)), "view"))
y = x.cycle = x
""",
    "segment never sent": POINTER + "x = Pointer(torch.zeros(9))",
    "segment never sent, in a cycle": POINTER + "x = [Pointer(torch.zeros(9))]\nx.append(x)",
    "segment received": POINTER + "x = received(sent(Pointer(torch.zeros(9))))",
    "segment looked at": POINTER
    + "x = received(sent(Pointer(torch.zeros(9))))\ny = x.tensor\nassert y is not None",
    "segment taken": POINTER + "x = received(sent(Pointer(torch.zeros(9))))\ny = x.materialize()",
    "segment that a peer took": POINTER
    + """
message = sent(Pointer(torch.zeros(9)))
x, y = received(message), received(message)
x.tensor, y.materialize()
""",
    "segment dropped, and then a fork": POINTER
    + """
import os
x = Pointer(torch.zeros(9))
x = None
if y := os.fork():
    os.waitpid(y, 0)
""",
    "segment held, and a fork": POINTER
    + """
import os
x = Pointer(torch.zeros(9))
if y := os.fork():
    os.waitpid(y, 0)
    assert os.path.exists(f"/dev/shm/{x.payload.name}")
""",
    "ticket never sent": TICKET,
    "ticket received": TICKET + "x = received(sent(held))",
    "ticket taken": TICKET + "x = received(sent(held))\ny = x.materialize()",
}


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    """Runs one program for each line that it gets, and says in a line how that ended."""
    with program(RUNNER) as process:
        yield process


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_without_output(name: str, runner: subprocess.Popen[str]) -> None:
    """As it is; and with a module of Python that holds all it has, which goes late."""
    assert runner.stdin is not None and runner.stdout is not None
    for late in (False, True):
        print(json.dumps((PROGRAMS[name], late)), file=runner.stdin, flush=True)
        pid, status, said = json.loads(runner.stdout.readline())
        assert (status, said) == (0, ""), late
        assert not list(SHM.glob(f"mmlane_{pid}_*")), late


# --- every finalizer in the source -------------------------------------------------------------------------


def modules() -> Iterator[tuple[str, Path]]:
    """The modules of the packages, and their files."""
    for package in (mmlane, mmlane_patches):
        for path in package.__path__:
            for file in sorted(Path(path).rglob("*.py")):
                parts = file.relative_to(path).with_suffix("").parts
                yield ".".join((package.__name__, *(part for part in parts if part != "__init__"))), file


def finalizers() -> Iterator[FunctionType]:
    """Every `__del__`, and every function that is the callback of a weak reference."""
    for name, file in modules():
        code = file.read_text(encoding="utf-8")
        if "__del__" not in code and "ref" not in code:  # some can only be imported beside an engine
            continue
        module = importlib.import_module(name)
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                if any(isinstance(part, ast.FunctionDef) and part.name == "__del__" for part in node.body):
                    yield vars(vars(module)[node.name])["__del__"]
            elif isinstance(node, ast.Call) and len(node.args) == 2 and is_weak_reference(vars(module), node.func):
                callback = ast.unparse(node.args[1])
                if not callback.endswith(
                    ("dropped.append", "_dead.append", "hold.end")
                ):  # a deque's, not written in Python
                    yield eval(callback, vars(module))


def is_weak_reference(module: dict[str, Any], called: ast.expr) -> bool:
    if not isinstance(called, ast.Name):
        return isinstance(called, ast.Attribute) and ast.unparse(called) == "weakref.ref"
    kind = module.get(called.id)
    return isinstance(kind, type) and issubclass(kind, weakref.ref)


def module_globals(code: CodeType) -> set[str]:
    loaded = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            loaded |= module_globals(inner)
    return loaded - set(vars(builtins))


def test_finalizers_need_no_module_and_do_nothing_at_the_end() -> None:
    found = [(finalizer.__qualname__, finalizer) for finalizer in finalizers()]
    assert {"Descriptor.__del__", "Mapping.__del__", "Segment.__del__", "Ticket.__del__", "Claim.__del__"} <= {
        name for name, _ in found
    }
    for name, finalizer in found:
        assert module_globals(finalizer.__code__) == set(), name
        # `object()` has nothing that could be used: it has to ask first.
        finalizer(object(), ending=lambda: True)
        assert inspect.signature(finalizer).parameters["ending"].default is sys.is_finalizing, name


# --- beside peers that live on -----------------------------------------------------------------------------

READER = """
    import os, sys, torch
    from mmlane.lane import Invitation, Reader

    reader = Reader("tp", 1)
    reader.join(Invitation.parse(bytes.fromhex(sys.stdin.readline())))
    tickets = sys.stdin.readline().split()
    tensors = [reader.take(bytes.fromhex(ticket), mode) for ticket, mode in zip(tickets, ["view", "cow"] * 2)]
    alias = tensors[0][5:].numpy()
    cycle = [tensors[-1]]
    cycle.append(cycle)
    del cycle
    torch.held_by_a_module = tensors[1][:7]
    assert int(alias[3]) == 1
    if "fork" in sys.argv[1] and os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == (3 if "raise" in sys.argv[1] else 0)
        print("forked", flush=True)
    if "close" in sys.argv[1]:
        reader.close()
    if "raise" in sys.argv[1]:
        sys.exit(3)
"""

PRODUCER = """
    import os, sys, torch
    from mmlane.lane import Lane

    lane = Lane({"tp": 1}, idle=0.05)
    print(bytes(lane.invitation).hex(), flush=True)
    assert lane.wait_open(60)
    kept = torch.arange(1000)
    print(lane.put(kept).hex(), flush=True)
    assert sys.stdin.readline().strip() == "taken"
    if "fork" in sys.argv[1] and os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        assert isinstance(lane.put(kept), bytes)
    if "close" in sys.argv[1]:
        lane.close()
    if "raise" in sys.argv[1]:
        sys.exit(3)
"""

ENDS = ["as it is", "close", "raise", "fork", "fork and close"]


@pytest.mark.parametrize("how", ENDS)
def test_a_reader_ends_with_tensors_held(company: Company, how: str) -> None:
    """Without a word, and the lane with it; the other reader gets what was issued (4)."""
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    other = company.reader("tp", invitation)
    with program(READER, how) as process:
        assert process.stdin is not None and process.stdout is not None
        print(bytes(invitation).hex(), file=process.stdin, flush=True)
        assert producer.call(Producing.wait_open)
        sent = [producer.call(Producing.put, seed, 10_000) for seed in range(4)]
        print(*(one.ticket.hex() for one in sent), file=process.stdin, flush=True)
        if "fork" in how:
            assert process.stdout.readline() == "forked\n"  # its child has ended
    eventually(lambda: not producer.call(Producing.is_open), "the producer hears of it")
    assert refused(producer) == Refused("closed", "reader 1 of 'tp' has ended")
    for one in sent:
        other.call(Reading.take, one)
    other.call(Reading.let_go)


@pytest.mark.parametrize("how", ENDS)
def test_a_producer_ends_with_tensors_out(company: Company, how: str) -> None:
    """Without a word, and readers keep what they hold (4)."""
    reader = company.reader("tp")
    with program(PRODUCER, how) as process:
        assert process.stdin is not None and process.stdout is not None
        invitation = Invitation.parse(bytes.fromhex(process.stdout.readline()))
        reader.call(Reading.join, invitation)
        company.names.add(invitation.name)
        company.files |= kernel.lane_files(process.pid)
        sent = Sent(bytes.fromhex(process.stdout.readline()), 0, 8000)
        reader.call(take_numbers, sent)
        print("taken", file=process.stdin, flush=True)
    hears_of_the_end(reader)
    reader.call(Reading.check)
    reader.call(Reading.let_go)


def take_numbers(reading: Reading, sent: Sent) -> None:
    """Take a tensor of numbers, and hold it as the bytes that it is."""
    reading.held[0] = (reading.reader.take(sent.ticket).view(torch.uint8), sent)
