"""The interpreter's end: a program that uses the lane correctly ends without a word, whatever it still holds.

Python takes modules apart while objects are still alive, so a finalizer that looks something up in its module may
find None there. Which of them goes first differs from run to run: each program is run several times.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import json
import os
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
from tests.lane.sandbox import DEADLINE  # noqa: E402

TIMES = 1  # run of each program as it is, and as many in which a module of Python holds them, which goes late
SHM = Path("/dev/shm")

# Imports what is slow to import, then forks once for each run of each program. The child comes to the end of this
# very script, so that its interpreter ends as that of any program; what it says on stderr, or its resource tracker
# does after it, comes through a pipe that is read to its end.
RUNNER = """
import json, os, sys
import torch, mmlane.lane.producer, mmlane.lane.reader, mmlane_patches.tickets
programs, times = json.loads(sys.argv[1]), int(sys.argv[2])
for name, run in [(name, run) for name in programs for run in range(2 * times)]:
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
    print(json.dumps([name, pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
else:
    os._exit(0)
del ours, theirs, pid, json, os
exec(programs[name])
if run % 2:
    sys.modules["os"].held = [globals().get(name) for name in ("lane", "reader", "x", "y", "producer", "held")]
"""

LANE = """
import torch
from mmlane.lane import Lane, Reader
lane = Lane({"tp": 1}, capacity=64 << 20)
reader = Reader("tp")
reader.join(lane.address)
assert lane.wait_open(10)
"""
POINTER = """
import pickle
import torch
from mmlane_patches.pointer import SegmentPointer, ShmPointerMMData
"""
TICKET = """
import torch
from mmlane_patches import lanes, pointer, tickets
Pointer = tickets.in_front_of(pointer.ShmPointerMMData)
producer = lanes.Producer({"tp": 1}, 64 << 20)
lanes.rank = lanes.Rank("tp")
lanes.producer.set(producer)
lanes.rank.notice(Pointer(torch.zeros(100_000)).hint)
assert producer.lane.wait_open(10)
held = Pointer(torch.zeros(100_000))
assert held.ticket
"""

PROGRAMS = {
    "nothing taken": LANE,
    "closed": LANE + "reader.close()\nlane.close()",
    "closed, and all threads have ended": LANE
    + "import threading\nreader.close()\nlane.close()\nfor x in threading.enumerate()[1:]: x.join()",
    "held": LANE + "x = reader.take(lane.put(torch.zeros(100_000)))",
    "held as a view": LANE + "x = reader.take(lane.put(torch.zeros(100_000)), 'view').numpy()",
    "held and closed": LANE + "x = reader.take(lane.put(torch.zeros(100_000)))\nreader.close()\nlane.close()",
    "held in a cycle": LANE + "x = [reader.take(lane.put(torch.zeros(100_000)))]\nx.append(x)",
    "not taken": LANE + "x = lane.put(torch.zeros(100_000))",
    "read by a finalizer": LANE
    + """
class Last:
    def __init__(self, tensor): self.tensor = tensor
    def __del__(self): assert self.tensor.sum() == 100_000
x = Last(reader.take(lane.put(torch.ones(100_000)), "view"))
y = x.cycle = x
""",
    "segment never sent": POINTER + "x = SegmentPointer(torch.zeros(9))",
    "segment never sent, in a cycle": POINTER + "x = [SegmentPointer(torch.zeros(9))]\nx.append(x)",
    "segment received": POINTER + "x = pickle.loads(pickle.dumps(SegmentPointer(torch.zeros(9))))",
    "segment looked at": POINTER
    + "x = pickle.loads(pickle.dumps(SegmentPointer(torch.zeros(9))))\ny = x.tensor\nassert y is not None",
    "segment taken": POINTER
    + "x = pickle.loads(pickle.dumps(SegmentPointer(torch.zeros(9))))\ny = x.materialize()",
    "segment that a peer took": POINTER
    + """
sent = pickle.dumps(SegmentPointer(torch.zeros(9)))
x, y = pickle.loads(sent), pickle.loads(sent)
x.tensor, y.materialize()
""",
    "segment dropped, and then a fork": POINTER
    + """
import os
x = SegmentPointer(torch.zeros(9))
x = None
if y := os.fork():
    os.waitpid(y, 0)
""",
    "segment held, and a fork": POINTER
    + """
import os
x = SegmentPointer(torch.zeros(9))
if y := os.fork():
    os.waitpid(y, 0)
    assert os.path.exists(f"/dev/shm/{x.shm_name}")
""",
    "ticket never sent": TICKET,
    "ticket received": TICKET + "x = Pointer.__new__(Pointer)\nx.__setstate__(held.__getstate__())",
    "ticket taken": TICKET
    + "x = Pointer.__new__(Pointer)\nx.__setstate__(held.__getstate__())\ny = x.materialize()",
}


@pytest.fixture(scope="module")
def ended() -> dict[str, list[tuple[int, int, str]]]:
    """Of each program, for each of its runs: pid, exit status, and what it said."""
    command = [sys.executable, "-c", RUNNER, json.dumps(PROGRAMS), str(TIMES)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, text=True, timeout=4 * DEADLINE, check=True
    )
    runs: dict[str, list[tuple[int, int, str]]] = {}
    for name, pid, status, said in map(json.loads, done.stdout.splitlines()):
        runs.setdefault(name, []).append((pid, status, said))
    return runs


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_ends_without_a_word(program: str, ended: dict[str, list[tuple[int, int, str]]]) -> None:
    runs = ended[program]
    assert [(status, said) for _, status, said in runs] == [(0, "")] * 2 * TIMES
    assert not [file.name for pid, _, _ in runs for file in SHM.glob(f"mmlane_{pid}_*")]


# --- every finalizer in the source --------------------------------------------------------------------------


def modules() -> Iterator[str]:
    """The modules of the packages; importing them does nothing."""
    for package in (mmlane, mmlane_patches):
        for path in package.__path__:
            for file in sorted(Path(path).rglob("*.py")):
                parts = file.relative_to(path).with_suffix("").parts
                yield ".".join((package.__name__, *(part for part in parts if part != "__init__")))


def finalizers() -> Iterator[FunctionType]:
    """Every `__del__`, and every function that is the callback of a weak reference."""
    for name in modules():
        module = importlib.import_module(name)
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                if any(isinstance(part, ast.FunctionDef) and part.name == "__del__" for part in node.body):
                    yield vars(vars(module)[node.name])["__del__"]
            elif isinstance(node, ast.Call) and len(node.args) == 2 and is_weak_reference(vars(module), node.func):
                yield eval(ast.unparse(node.args[1]), vars(module))


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
    assert {"Descriptor.__del__", "Mapping.__del__", "SegmentPointer.__del__", "_let_go"} <= {
        name for name, _ in found
    }
    for name, finalizer in found:
        assert module_globals(finalizer.__code__) == set(), name
        # `object()` has nothing that could be used: it has to ask first.
        finalizer(object(), ending=lambda: True)
        assert inspect.signature(finalizer).parameters["ending"].default is sys.is_finalizing, name
