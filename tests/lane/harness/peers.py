"""Producers and readers as processes of their own, which do what they are told, and stop or die where told to.

    def test(company: Company) -> None:
        producer = company.producer({"tp": 1})
        reader = company.reader("tp", company.invitation(producer))
        sent = producer.call(Producing.put, seed=1, nbytes=1000)
        reader.call(Reading.take, sent)

`Producing` and `Reading` are what lives in them; any other function whose first argument is one can be called too.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

from mmlane.lane import Invitation, Lane, LaneError, LaneStats, Mode, Reader, Refused, Reservation
from mmlane.lane.issuing import SLOTS
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Action, Gate, Where, arm
from tests.lane.harness.child import Child, pipe
from tests.lane.harness.lane_with_readers import SEGMENT
from tests.lane.harness.payloads import MODES, Sent, difference, stamp
from tests.lane.harness.waiting import DEADLINE, eventually

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Producing | Reading", covariant=True)

# Of the small lanes that many tests have.
CAPACITY = 32 * SEGMENT
DIRECTORY = SLOTS * 8  # bytes of a lane that are always there
SIZES = (5, 3_000, 70_000, 200_000)

FOREVER = 1800.0  # seconds that no test lasts


# --- in the processes --------------------------------------------------------------------------------------


class Producing:
    """A producer: one lane, and the copies that it keeps there."""

    def __init__(self, readers: dict[str, int], **options: Any) -> None:
        self.lane = Lane(readers, **options)
        self.copies: dict[int, tuple[Reservation, int]] = {}  # with how many tickets there will be

    def invitation(self) -> Invitation:
        return self.lane.invitation

    def put(self, seed: int, nbytes: int, *, uses: int = 1) -> Sent:
        """Put a stamped tensor. uses: how many tickets there will be for this seed, of which this is the first."""
        sent = self.try_put(seed, nbytes, uses=uses)
        if isinstance(sent, Refused):
            raise AssertionError(f"payload {seed} of {nbytes} bytes was refused: {sent}")
        return sent

    def try_put(self, seed: int, nbytes: int, *, uses: int = 1) -> Sent | Refused:
        """As `put`, where a refusal is an answer."""
        if seed not in self.copies and uses == 1:
            ticket = self.lane.put(stamp(seed, nbytes))
        else:
            kept = self.copies.pop(seed, None)
            copy, left = (self.lane.copy(stamp(seed, nbytes)), uses) if kept is None else kept
            if isinstance(copy, Refused):
                return copy
            ticket = copy.publish()
            if left > 1 and not isinstance(ticket, Refused):  # else no caller would say that it is to be forgotten
                self.copies[seed] = copy, left - 1
        return ticket if isinstance(ticket, Refused) else Sent(ticket, seed, nbytes)

    def put_many(self, seed: int, nbytes: int, count: int) -> list[Sent]:
        """So many tickets on one copy of a tensor."""
        return [self.put(seed, nbytes, uses=count), *(self.put(seed, nbytes) for _ in range(count - 1))]

    def forget(self, seed: int) -> None:
        """Keep a copy no longer."""
        self.copies.pop(seed)[0].close()

    def withdraw(self, ticket: bytes) -> None:
        self.lane.withdraw(ticket)

    def set_orphan(self, seconds: float) -> None:
        """From now on the lane asks after tickets of this age."""
        self.lane.housekeeping.orphan = seconds

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

    def __init__(self, group: str, number: int, linger: float = 30.0) -> None:
        self.reader = Reader(group, number, linger=linger)
        self.linger = linger
        self.held: dict[int, tuple[torch.Tensor, Sent]] = {}
        self._numbers = itertools.count(1)

    def join(self, invitation: Invitation) -> None:
        self.reader.join(invitation, timeout=DEADLINE)

    def take(self, sent: Sent, mode: Mode = "view") -> int:
        """Take a ticket, look at its tensor in whole, and hold it; the number it is held by."""
        tensor = self.reader.take(sent.ticket, mode)
        problem = difference(tensor, sent.seed, sent.nbytes)
        if problem:
            raise AssertionError(f"taken as {mode}: {problem}")
        number = next(self._numbers)
        self.held[number] = (tensor, sent)
        return number

    def take_many(self, many: list[Sent]) -> None:
        for sent in many:
            self.take(sent)

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

    def leave(self) -> None:
        """Leave all lanes, and be another reader from now on, in the same place."""
        self.reader.close()
        self.reader = Reader(self.reader.group, self.reader.number, linger=self.linger)

    def come_back(self, invitation: Invitation) -> None:
        """Leave, and join; which is refused where the producer has yet to hear of the former."""
        self.leave()
        self.join(invitation)


_gates: list[Gate] = []


def shut_gate(_: Producing | Reading, point: str, nth: int = 1) -> None:
    """Hold up the threads over there at a point, from the nth time on."""
    _gates.append(Gate(point, nth=nth))


def wait_at_gate(_: Producing | Reading) -> None:
    """Wait until a thread is held up."""
    _gates[-1].wait()


def open_gate(_: Producing | Reading) -> None:
    """Let all go on."""
    _gates.pop().open()


def _serve(
    pipe: Connection,
    words: Connection,
    make: Callable[..., Producing | Reading],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> list[str]:
    """A peer's life: make the state, then call what comes on it, until told to end. What went wrong unseen."""
    torch.set_num_threads(1)  # the only threads here are to be the lane's
    problems: list[str] = []

    def unhandled(kind: Any, error: Any, trace: Any) -> None:
        problems.append("".join(traceback.format_exception(kind, error, trace)))

    threading.excepthook = lambda hook: unhandled(hook.exc_type, hook.exc_value, hook.exc_traceback)
    sys.unraisablehook = lambda hook: unhandled(hook.exc_type, hook.exc_value, hook.exc_traceback)
    state = make(*args, **options)
    pipe.send(("answered", None))
    while True:
        function, args, options = pipe.recv()
        if function is None:
            state.close()
            return problems
        try:
            if function is arm:
                answer: tuple[str, Any] = ("answered", arm(words, args))
            else:
                answer = ("answered", function(state, *args, **options))
        except (LaneError, AssertionError, ValueError) as error:
            answer = ("raised", error)
        pipe.send(answer)


# --- from outside ------------------------------------------------------------------------------------------


class Peer(Child, Generic[S]):
    """A process with a state in it, to call functions on. One call at a time, from one thread."""

    def __init__(self, make: Callable[P, S], *args: P.args, **options: P.kwargs) -> None:
        self._words, words = pipe(duplex=False)
        super().__init__(_serve, words, make, args, options)
        words.close()

    def call(self, function: Callable[Concatenate[S, P], T], *args: P.args, **options: P.kwargs) -> T:
        """What a function returns on the state over there. Raises what it raised, Died, Failed, TimeoutError."""
        self.start(function, *args, **options)
        result: T = self.answer()
        return result

    def start(self, function: Callable[Concatenate[S, P], T], *args: P.args, **options: P.kwargs) -> None:
        """As `call`, without waiting: `answer` does."""
        self.say((function, args, options))

    def fileno(self) -> int:
        """A descriptor that is readable when there is an answer."""
        return self._pipe.fileno()

    def answer(self) -> Any:
        """The result of what was started."""
        word, value = self.hear()
        if word == "raised":
            raise value
        return value

    def arm(self, point: str, nth: int = 1, action: Action = "kill", where: Where = "anywhere") -> None:
        """Have it kill or stop itself when a thread (any, the main or another one) is at a point the nth time.

        It can be armed with several.
        """
        self.say((arm, (point, nth, action, where), {}))
        self.answer()

    def disarm(self) -> None:
        """Have it go on past all points."""
        self.say((arm, (), {}))
        self.answer()

    def last_words(self) -> str:
        """The point that it said it was at, before it killed or stopped itself."""
        if not self._words.poll(DEADLINE):
            raise TimeoutError(f"process {self.pid} has reached no point in {DEADLINE:g} s")
        return self._words.recv_bytes().decode()

    def end(self) -> None:
        """Have it close what it has and end the usual way; fails if anything went wrong in there unseen."""
        self.say((None, (), {}))
        problems = self.result()
        assert self.exitcode() == 0
        assert not problems, "\n".join(problems)

    def put_down(self) -> None:
        super().put_down()
        self._words.close()


AnyPeer = TypeVar("AnyPeer", bound=Peer[Any])


class Company:
    """The processes of one test. After one that went well each of them ends well, and nothing is left."""

    def __init__(self) -> None:
        self.peers: list[Peer[Any]] = []
        self.names: set[str] = set()
        self.files: set[int] = set()
        self._next: Counter[str] = Counter()  # by group

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
        name, files = self.invitation(peer).name, kernel.lane_files(peer.pid)
        kinds = {trace.kind for trace in kernel.traces([name], files)}
        assert kinds == {"descriptor", "mapping", "socket"}, "the kernel tells nothing"
        self.names.add(name)
        self.files |= files
        return peer

    def reader(
        self, group: str, *invitations: Invitation, number: int | None = None, linger: float = 30.0
    ) -> Peer[Reading]:
        """A process with a reader that has joined these lanes; with the next number of its group by default."""
        if number is None:
            number = self._next[group]
            self._next[group] += 1
        peer = self.add(Peer(Reading, group, number, linger))
        for invitation in invitations:
            peer.call(Reading.join, invitation)
        return peer

    def invitation(self, producer: Peer[Producing]) -> Invitation:
        return producer.call(Producing.invitation)

    def open(
        self, groups: Iterable[str], expected: dict[str, int] | None = None, **options: Any
    ) -> tuple[Peer[Producing], list[Peer[Reading]]]:
        """A producer whose readers, one for each name, have all joined."""
        groups = list(groups)
        wanted = {group: groups.count(group) for group in groups}
        producer = self.producer(wanted if expected is None else expected, **options)
        self._next.clear()
        invitation = self.invitation(producer)
        readers = [self.reader(group, invitation) for group in groups]
        assert producer.call(Producing.wait_open)
        return producer, readers

    def nothing_is_left(self) -> None:
        """Now that all processes have ended, not a trace of their lanes may be anywhere."""
        pids = [peer.pid for peer in self.peers]
        # The kernel may still be at it when a parent hears of a death.
        eventually(lambda: not kernel.traces(self.names, self.files, pids), "all traces of the lanes go")

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


# --- what many tests say of peers --------------------------------------------------------------------------


def carries(producer: Peer[Producing], *readers: Peer[Reading]) -> None:
    """A lane does what lanes are for: all sizes arrive at each of these readers, in one mode or another."""
    for seed, nbytes in enumerate(SIZES, 5000):
        sent = producer.call(Producing.put, seed, nbytes)
        for reader, mode in zip(readers, itertools.cycle(MODES)):
            reader.call(Reading.let_go, reader.call(Reading.take, sent, mode))


def refused(producer: Peer[Producing], nbytes: int = 1000) -> Refused:
    """Why a producer issues no ticket."""
    answer = producer.call(Producing.try_put, 999, nbytes)
    assert isinstance(answer, Refused)
    return answer


def tickets(producer: Peer[Producing]) -> int:
    """How many tickets are out."""
    return producer.call(Producing.stats).tickets


def baseline(producer: Peer[Producing]) -> LaneStats:
    """Wait until nothing is out any more; fails where something is lost for ever."""

    def look() -> LaneStats | None:
        stats = producer.call(Producing.stats)
        return stats if (stats.used_bytes, stats.tickets, stats.extents) == (0, 0, 0) else None

    stats = eventually(look, "the lane comes back to its baseline")
    assert stats is not None
    return stats


def falls_asleep(peer: Peer[Any], seconds: float) -> dict[int, int]:
    """Wait until no thread of a process was woken for a while; how often each has gone to sleep by then."""

    def asleep() -> dict[int, int]:
        """All of them sleep, none waits for its turn on a busy machine."""
        return kernel.sleeps(peer.pid) if set(kernel.thread_states(peer.pid).values()) == {"S"} else {}

    def quiet() -> dict[int, int]:
        before = asleep()
        time.sleep(seconds)  # that nothing happens is no event
        return before if asleep() == before else {}

    return eventually(quiet, f"process {peer.pid} is not woken for {seconds:g} s")


def hears_of_the_end(reader: Peer[Reading]) -> None:
    """Wait until a reader knows that all its lanes have ended."""
    eventually(lambda: reader.call(Reading.lanes) == (), "a reader hears of the end")
