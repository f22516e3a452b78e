"""Producers and readers as processes of their own, which do what they are told, and stop or die where told to.

    def test(company: Company) -> None:
        producer = company.producer({"tp": 1})
        reader = company.reader("tp", company.address(producer))
        sent = producer.call(Producing.put, seed=1, nbytes=1000)
        reader.call(Reading.take, sent)

`Producing` and `Reading` are what lives in them; any other function whose first argument is one can be called too.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

import torch

from mmlane.lane import Lane, LaneError, LaneStats, Mode, Reader, Refused, Share, points
from tests.lane import oracle

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Producing | Reading", covariant=True)

DEADLINE = 90.0  # seconds; only a fault takes that long

# A server that has imported torch forks the processes: each is there at once, and none inherits a thread.
_processes = get_context("forkserver")
_processes.set_forkserver_preload(["torch", "hypothesis", "pytest", "mmlane.lane"])

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_the_parent() -> None:
    """Have this process killed when its parent ends, whatever the parent ends of."""
    if _libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG
        raise OSError(ctypes.get_errno(), "prctl")


def eventually(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Poll a condition for which there is no event, until it holds; returns what it says then."""
    until = time.monotonic() + deadline
    while not (result := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"{what}: not within {deadline:g} s; the last look found {result!r}")
        time.sleep(0.005)
    return result


# --- payloads ----------------------------------------------------------------------------------------------


def stamp(seed: int, nbytes: int) -> torch.Tensor:
    """Bytes that tell where they are from: 64-bit words, the seed in the upper half, the position in the lower.

    So any word of another payload, or from elsewhere in the same, is a wrong one.
    """
    words = torch.arange(-(-nbytes // 8), dtype=torch.int64)
    words += seed << 32
    return words.view(torch.uint8)[:nbytes]


def difference(tensor: torch.Tensor, seed: int, nbytes: int) -> str:
    """What is wrong with a payload, looked at in whole; empty when nothing is."""
    if (tensor.dtype, tuple(tensor.shape)) != (torch.uint8, (nbytes,)):
        return f"{tensor.dtype} of shape {tuple(tensor.shape)} instead of {nbytes} bytes"
    wanted = stamp(seed, nbytes)
    if torch.equal(tensor, wanted):
        return ""
    wrong = (tensor != wanted).nonzero()
    if not len(wrong):
        return "a difference that was gone at the second look"
    first = int(wrong[0])
    found = tensor[first - first % 8 :][:8].tolist()
    source = int.from_bytes(bytes(found[4:8]), "little")
    return (
        f"payload {seed} of {nbytes} bytes: {len(wrong)} wrong, from byte {first} on: {found}, as if of {source}"
    )


@dataclass(frozen=True)
class Sent:
    """A ticket, and what its tensor has to look like."""

    ticket: bytes
    seed: int
    nbytes: int


# --- in the processes --------------------------------------------------------------------------------------


class Producing:
    """A producer: one lane, and its shares."""

    def __init__(self, readers: dict[str, int], **options: Any) -> None:
        self.lane = Lane(readers, **options)
        self.shares: dict[int, Share] = {}

    def address(self) -> str:
        return self.lane.address

    def put(self, seed: int, nbytes: int, *, uses: int = 1) -> Sent:
        """Put a stamped tensor. uses: of a share for this seed, of which this put is the first."""
        sent = self.try_put(seed, nbytes, uses=uses)
        if isinstance(sent, Refused):
            raise AssertionError(f"payload {seed} of {nbytes} bytes was refused: {sent}")
        return sent

    def try_put(self, seed: int, nbytes: int, *, uses: int = 1) -> Sent | Refused:
        """As `put`, where a refusal is an answer."""
        if uses > 1:
            self.shares[seed] = self.lane.share(uses)
        ticket = self.lane.put(stamp(seed, nbytes), share=self.shares.get(seed))
        return ticket if isinstance(ticket, Refused) else Sent(ticket, seed, nbytes)

    def forget(self, seed: int) -> None:
        """Close a share."""
        self.shares.pop(seed).close()

    def withdraw(self, ticket: bytes) -> None:
        self.lane.withdraw(ticket)

    def drain(self) -> None:
        self.lane.drain()

    def stats(self) -> LaneStats:
        return self.lane.stats()

    def is_open(self) -> bool:
        return self.lane.is_open

    def wait_open(self) -> bool:
        return self.lane.wait_open(DEADLINE)

    def close(self) -> None:
        self.lane.close()


class Reading:
    """A reader, and the tensors that it holds."""

    def __init__(self, group: str, linger: float = 30.0) -> None:
        self.reader = Reader(group, linger=linger)
        self.linger = linger
        self.held: dict[int, tuple[torch.Tensor, Sent]] = {}
        self._numbers = itertools.count(1)

    def join(self, address: str) -> None:
        self.reader.join(address, timeout=DEADLINE)

    def take(self, sent: Sent, mode: Mode = "view") -> int:
        """Take a ticket, look at its tensor in whole, and hold it; the number it is held by."""
        tensor = self.reader.take(sent.ticket, mode)
        problem = difference(tensor, sent.seed, sent.nbytes)
        if problem:
            raise AssertionError(f"taken as {mode}: {problem}")
        number = next(self._numbers)
        self.held[number] = (tensor, sent)
        return number

    def discard(self, sent: Sent) -> None:
        self.reader.discard(sent.ticket)

    def check(self) -> int:
        """Look at all that is held, in whole; how many there are."""
        for tensor, sent in self.held.values():
            problem = difference(tensor, sent.seed, sent.nbytes)
            if problem:
                raise AssertionError(f"while held: {problem}")
        return len(self.held)

    def let_go(self, *numbers: int) -> None:
        """Let these go, or all."""
        for number in numbers or tuple(self.held):
            del self.held[number]

    def lanes(self) -> tuple[str, ...]:
        return self.reader.lanes()

    def close(self) -> None:
        self.reader.close()

    def come_back(self, address: str) -> None:
        """Be another reader from now on; the former one still gives back what is held of it."""
        self.reader.close()
        self.reader = Reader(self.reader.group, linger=self.linger)
        self.join(address)


Action = Literal["kill", "stop"]
Where = Literal["anywhere", "main", "beside"]


def _is_here(where: Where) -> bool:
    main = threading.current_thread() is threading.main_thread()
    return where == "anywhere" or main == (where == "main")


class Gate:
    """Holds up the threads of this process at a point, from the nth time on, until it is opened."""

    def __init__(self, point: str, where: Where = "anywhere", nth: int = 1) -> None:
        self._point, self._where, self._nth = point, where, nth
        self._times = itertools.count(1)
        self._reached, self._open = threading.Event(), threading.Event()
        points.probe = self

    def __call__(self, name: str) -> None:
        if name == self._point and _is_here(self._where) and next(self._times) >= self._nth:
            self._reached.set()
            assert self._open.wait(DEADLINE)

    def wait(self) -> None:
        """Wait until a thread is there."""
        assert self._reached.wait(DEADLINE), f"no thread has come to {self._point}"

    def open(self) -> None:
        """Let all go on, now and later."""
        points.probe = None
        self._open.set()


class _Probe:
    """Kills or stops this process when it is at a point for the nth time, after saying so."""

    def __init__(self, words: Connection, point: str, nth: int, action: Action, where: Where) -> None:
        self._words, self._point, self._nth, self._where = words, point, nth, where
        self._signal = signal.SIGKILL if action == "kill" else signal.SIGSTOP
        self._times = itertools.count(1)

    def __call__(self, name: str) -> None:
        if name == self._point and _is_here(self._where) and next(self._times) == self._nth:
            self._words.send_bytes(name.encode())
            signal.pthread_kill(threading.get_ident(), self._signal)  # this very thread goes no step further


class _Probes(list[_Probe]):
    """All that this process is armed with."""

    def __call__(self, name: str) -> None:
        for probe in self:
            probe(name)


def _arm(words: Connection, arguments: tuple[Any, ...]) -> None:
    armed = points.probe if isinstance(points.probe, _Probes) else _Probes()
    points.probe = _Probes([*armed, _Probe(words, *arguments)]) if arguments else None


def _serve(
    commands: Connection,
    words: Connection,
    make: Callable[..., Producing | Reading],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """A process's life: make the state, then call what comes on it, until told to end."""
    die_with_the_parent()
    torch.set_num_threads(1)  # the only threads here are to be the lane's
    problems: list[str] = []

    def unhandled(kind: Any, error: Any, trace: Any) -> None:
        problems.append("".join(traceback.format_exception(kind, error, trace)))

    threading.excepthook = lambda hook: unhandled(hook.exc_type, hook.exc_value, hook.exc_traceback)
    sys.unraisablehook = lambda hook: unhandled(hook.exc_type, hook.exc_value, hook.exc_traceback)
    state = make(*args, **options)
    commands.send(("returned", None))
    while True:
        try:
            function, args, options = commands.recv()
        except EOFError:
            return
        if function is None:
            break
        try:
            if function is _arm:
                answer: tuple[str, Any] = ("returned", _arm(words, args))
            else:
                answer = ("returned", function(state, *args, **options))
        except (LaneError, AssertionError, ValueError) as error:
            answer = ("raised", error)
        except BaseException:
            commands.send(("failed", traceback.format_exc()))
            raise
        commands.send(answer)
    state.close()
    commands.send(("returned", problems))


# --- from outside ------------------------------------------------------------------------------------------


class Died(Exception):
    """A process ended instead of answering. `exitcode`: minus the signal's number, if a signal ended it."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"exit code {exitcode}")
        self.exitcode = exitcode


class Failed(Exception):
    """A process raised what nobody expects; the text is its traceback."""


class Peer(Generic[S]):
    """A process with a state in it, to call functions on. One call at a time, from one thread."""

    def __init__(self, make: Callable[P, S], *args: P.args, **options: P.kwargs) -> None:
        self._commands, commands = _processes.Pipe()
        self._words, words = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=_serve, args=(commands, words, make, args, options))
        self._process.start()
        commands.close()
        words.close()
        pid = self._process.pid
        assert pid is not None
        self.pid = pid

    def call(self, function: Callable[Concatenate[S, P], T], *args: P.args, **options: P.kwargs) -> T:
        """What a function returns on the state over there. Raises what it raised, Died, Failed, TimeoutError."""
        self.start(function, *args, **options)
        result: T = self.answer()
        return result

    def start(self, function: Callable[Concatenate[S, P], T], *args: P.args, **options: P.kwargs) -> None:
        """As `call`, without waiting: `answer` does."""
        self._send(function, args, options)

    def _send(self, function: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            self._commands.send((function, args, options))
        except BrokenPipeError:
            raise Died(self.exitcode()) from None

    def fileno(self) -> int:
        """A descriptor that is readable when there is an answer."""
        return self._commands.fileno()

    def answer(self) -> Any:
        """The result of what was started."""
        if not self._commands.poll(DEADLINE):
            raise TimeoutError(f"process {self.pid} says nothing for {DEADLINE:g} s")
        try:
            word, value = self._commands.recv()
        except (EOFError, ConnectionResetError):
            raise Died(self.exitcode()) from None
        if word == "failed":
            raise Failed(value)
        if word == "raised":
            raise value
        return value

    # --- life and death ------------------------------------------------------------------------------------

    def arm(self, point: str, nth: int = 1, action: Action = "kill", where: Where = "anywhere") -> None:
        """Have it kill or stop itself when a thread (any, the main or another one) is at a point the nth time.

        It can be armed with several.
        """
        self._send(_arm, (point, nth, action, where), {})
        self.answer()

    def disarm(self) -> None:
        """Have it go on past all points."""
        self._send(_arm, (), {})
        self.answer()

    def last_words(self) -> str:
        """The point that it said it was at, before it killed or stopped itself."""
        if not self._words.poll(DEADLINE):
            raise TimeoutError(f"process {self.pid} has reached no point in {DEADLINE:g} s")
        return self._words.recv_bytes().decode()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def exitcode(self) -> int | None:
        """Wait for its end: minus the signal's number, if a signal ended it."""
        self._process.join(DEADLINE)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        assert self.exitcode() == -signal.SIGKILL

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Wait until all its threads have stopped."""
        eventually(lambda: set(oracle.thread_states(self.pid).values()) == {"T"}, f"process {self.pid} stops")

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """Have it close what it has and end the usual way; fails if anything went wrong in there unseen."""
        self._send(None, (), {})
        problems = self.answer()
        assert self.exitcode() == 0
        assert not problems, "\n".join(problems)

    def put_down(self) -> None:
        """Whatever state it is in, have it gone, and this end closed."""
        self._process.kill()
        self._process.join(DEADLINE)
        self._commands.close()
        self._words.close()
        self._process.close()


AnyPeer = TypeVar("AnyPeer", bound=Peer[Any])


class Company:
    """The processes of one test. After one that went well each of them ends well, and nothing is left."""

    def __init__(self) -> None:
        self.peers: list[Peer[Any]] = []
        self.addresses: set[str] = set()
        self.files: set[int] = set()

    def add(self, peer: AnyPeer) -> AnyPeer:
        """One more, which is ready when this returns."""
        self.peers.append(peer)
        peer.answer()
        return peer

    def producer(self, readers: dict[str, int], **options: Any) -> Peer[Producing]:
        """A process with a lane."""
        return self.add_producer(Peer(Producing, readers, **options))

    def add_producer(self, peer: AnyPeer) -> AnyPeer:
        """One more, with a lane of which nothing may be left in the end."""
        self.add(peer)
        address, files = self.address(peer), oracle.lane_files(peer.pid)
        kinds = {trace.kind for trace in oracle.traces([address], files)}
        assert kinds == {"descriptor", "mapping", "socket"}, "the oracle is blind"
        self.addresses.add(address)
        self.files |= files
        return peer

    def reader(self, group: str, *addresses: str, linger: float = 30.0) -> Peer[Reading]:
        """A process with a reader that has joined these lanes."""
        peer = self.add(Peer(Reading, group, linger))
        for address in addresses:
            peer.call(Reading.join, address)
        return peer

    def address(self, producer: Peer[Producing]) -> str:
        return producer.call(Producing.address)

    def open(
        self, groups: Iterable[str], expected: dict[str, int] | None = None, **options: Any
    ) -> tuple[Peer[Producing], list[Peer[Reading]]]:
        """A producer whose readers, one for each name, have all joined."""
        groups = list(groups)
        wanted = {group: groups.count(group) for group in groups}
        producer = self.producer(wanted if expected is None else expected, **options)
        address = self.address(producer)
        readers = [self.reader(group, address) for group in groups]
        assert producer.call(Producing.wait_open)
        return producer, readers

    def nothing_is_left(self) -> None:
        """Now that all processes have ended, not a trace of their lanes may be anywhere."""
        pids = [peer.pid for peer in self.peers]
        # The kernel may still be at it when a parent hears of a death.
        eventually(lambda: not oracle.traces(self.addresses, self.files, pids), "all traces of the lanes go")

    def end(self) -> None:
        """Have each that lives end, well; not a trace of their lanes is left then."""
        for peer in self.peers:
            if peer.is_alive():
                peer.end()
        self.nothing_is_left()

    def put_down(self) -> None:
        """Whatever state they are in, have them gone."""
        for peer in self.peers:
            peer.put_down()


def baseline(producer: Peer[Producing]) -> LaneStats:
    """Wait until nothing is out any more; fails where something is lost for ever."""

    def look() -> LaneStats | None:
        stats = producer.call(Producing.stats)
        return stats if (stats.taken, stats.tickets, stats.extents) == (0, 0, 0) else None

    stats = eventually(look, "the lane comes back to its baseline")
    assert stats is not None
    return stats


def hears_of_the_end(reader: Peer[Reading]) -> None:
    """Wait until a reader knows that all its lanes have ended."""
    eventually(lambda: reader.call(Reading.lanes) == (), "a reader hears of the end")
