"""A model of the lane's protocol: who joins, who owes what, what is reused. Pure: no sockets, threads, or time.

Each method of `World` is one step of one party. What a party sends waits at the other end until that end takes a
step, so a delay, a stopped process and a held interpreter lock are one thing here: a party is not scheduled. A
time-out is a step, too, and may come at any moment.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

Place = tuple[str, int]  # group, number

EXPECTED: tuple[Place, ...] = (("a", 0), ("a", 1), ("b", 0))
EXTENTS = 2
UNPROVEN = 2  # connections at most that have yet to prove that they know the secret

# What must hold after every step. The numbers are those of docs/lane.md.
INVARIANTS = {
    "I1": "one rank took a ticket that another rank of its group refuses",
    "I2": "an extent is free or used again while a rank holds its ticket",
    "I7 open": "the lane is open without one of its ranks",
    "I7 read": "an uninvited process was sent the descriptor",
    "I7 fill": "a ticket is owed by an uninvited process",
    "I7 visit": "a visitor was answered whose pid is not visible here",
    "W put": "a put waits for a log handler",
    "W drop": "a finalizer waits for the producer, or for its reader's thread",
    "L": "uninvited processes are silent, all ranks run, and the lane never opens",
}


@dataclass(frozen=True)
class Rules:
    """What the parties keep to. All of it in protocol 3; some of it in protocol 2."""

    proof: bool = True  # a connection becomes a member only if it proves that it knows the secret
    proof_first: bool = True  # before the descriptor is sent, not later
    visible: bool = True  # a peer whose pid is not visible is rejected
    numbered: bool = True  # a lane opens by (group, number), one connection each, instead of by their count
    end_first: bool = True  # the end of a number's older connection is handled before a newer one is let in
    ends_with_member: bool = True  # the first member that ends closes an open lane; it never reopens
    mapped_is_joined: bool = True  # a reader is joined when it has sent MAPPED: it neither waits nor gives up
    known_first: bool = True  # a reader can take tickets before it sends MAPPED, not a moment later
    proven_may_stay: bool = True  # the producer gives a connection that has proven itself any time
    unproven_must_go: bool = True  # ... and any other a deadline
    tries_again: bool = True  # a rank that was rejected, or gave up before MAPPED, connects again
    hands_over: bool = True  # a finalizer hands a ticket to the reader's thread
    logs_after: bool = True  # no line is logged with the lane's lock held
    all_owe: bool = True  # a ticket ends with the last member that owes it
    by_serial: bool = True  # RELEASE names the ticket, not only its slot
    holder_is_silent: bool = True  # who has seen a ticket does not answer RECALL
    promise_kept: bool = True  # who has said NOT_SEEN refuses the ticket from then on
    linger: bool = True  # assumed: a reader forgets a lane that ended only after all its tickets have arrived


PROTOCOL_3 = Rules()
PROTOCOL_2 = replace(
    PROTOCOL_3,
    **dict.fromkeys(["proof", "visible", "numbered", "ends_with_member", "mapped_is_joined"], False),
    **dict.fromkeys(["proven_may_stay", "hands_over", "logs_after"], False),
)


@dataclass(eq=False, repr=False)
class Process:
    """A rank of this engine, or an uninvited process: one of the same user without a place."""

    place: Place | None = None
    visible: bool = True
    alive: bool = True
    # out, waiting (for WELCOME), mapped (and waiting for JOINED), about to know, joined, ended, forgotten, left
    state: str = "out"
    connection: Connection | None = None
    floor: int = 0  # protocol 2: the serial up to which tickets are refused
    seen: set[Ticket] = field(default_factory=set)
    held: set[Ticket] = field(default_factory=set)
    promised: set[Ticket] = field(default_factory=set)  # those it said NOT_SEEN for
    handed: deque[Ticket] = field(default_factory=deque)  # by finalizers, to its reader's thread
    answering: Ticket | None = None  # its reader's thread holds the lock of what was seen, to answer RECALL

    def __repr__(self) -> str:
        return "uninvited" if self.place is None else "{}{}".format(*self.place)


@dataclass(eq=False, repr=False)
class Connection:
    """Both ends of a connection, and what is on its way."""

    owner: Process
    stage: str = "queued"  # at the producer: queued, unproven, proven, member, gone
    place: Place = ("", 0)
    proof: bool = False
    to_producer: deque[tuple[Any, ...]] = field(default_factory=deque)
    to_reader: deque[tuple[Any, ...]] = field(default_factory=deque)
    left: bool = False  # the owner's end is closed
    cut: bool = False  # the producer's end is closed

    def __repr__(self) -> str:
        return f"connection of {self.owner}"


@dataclass(eq=False, repr=False)
class Ticket:
    """A ticket, and what became of it. needed_by: the ranks of its group that must not part over it."""

    serial: int
    extent: int
    owed: dict[str, set[Connection]]
    needed_by: set[Process]
    group: str
    claimed: bool = False
    recalled: bool = False
    ended: bool = False
    took: set[Process] = field(default_factory=set)
    refused: set[Process] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"ticket {self.serial}"


class World:
    """A producer, the ranks it expects, and uninvited processes."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.ranks = {place: Process(place) for place in EXPECTED}
        self.processes = list(self.ranks.values())
        self.connections: list[Connection] = []
        self.tickets: list[Ticket] = []
        self.extents: list[Ticket | None] = [None] * EXTENTS
        self.producer_lives = True
        self.opened = self.closed = False
        self.locked = False  # a log handler has been called with the lane's lock held, and has yet to return
        self.violations: set[str] = set()

    # --- the producer's control thread ---------------------------------------------------------------------

    def serve(self, connection: Connection) -> None:
        """Take the next step with a connection: accept it, or handle its next message, or its end."""
        if self.closed or self.locked or not self.has_work(connection):
            return
        if connection.stage == "queued":
            self._accept(connection)
        elif connection.to_producer:
            self._hear(connection, *connection.to_producer.popleft())
        else:
            self._ended(connection)

    def has_work(self, connection: Connection) -> bool:
        return connection.stage != "gone" and bool(
            connection.stage == "queued" or connection.to_producer or connection.left
        )

    def give_up_on(self, connection: Connection) -> None:
        """The time has passed in which a connection had to say something."""
        deadline = {"unproven": self.rules.unproven_must_go, "proven": not self.rules.proven_may_stay}
        if deadline.get(connection.stage) and not self.locked:
            self._reject(connection)

    def recall(self, ticket: Ticket) -> None:
        """Ask the members that owe a ticket whether they have seen it."""
        if not self.closed and not ticket.ended:
            ticket.recalled = True
            for connection in set().union(*ticket.owed.values()):
                connection.to_reader.append(("RECALL", ticket))

    def close(self) -> None:
        """End the lane: nothing is issued, ended or used again any more. Its death is the same to all others."""
        self.closed = True
        for connection in self.connections:
            connection.cut = True
            connection.stage = "gone"

    def log_handler_returns(self) -> None:
        self.locked = False

    def _accept(self, connection: Connection) -> None:
        pending = sum(other.stage == "unproven" for other in self.connections)
        if pending >= UNPROVEN or (self.rules.visible and not connection.owner.visible):
            self._reject(connection)
        else:
            connection.stage = "unproven"

    def _hear(self, connection: Connection, kind: str, *content: Any) -> None:
        match connection.stage, kind:
            case "unproven", "HELLO":
                self._handle_hello(connection, *content)
            case "unproven", "STATUS":
                if not connection.owner.visible:
                    self.violations.add("I7 visit")
                self._reject(connection)  # after the answer
            case "proven", "MAPPED":
                self._admit(connection)
            case "member", "RELEASE":
                self._release(connection, *content)
            case "member", "NOT_SEEN":
                self._not_seen(connection, *content)
            case "member", _:
                pass  # malformed: counted
            case _:
                self._reject(connection)

    def _handle_hello(self, connection: Connection, place: Place, proof: bool) -> None:
        rules = self.rules
        if place not in EXPECTED or (rules.proof and rules.proof_first and not proof):
            return self._reject(connection)
        older = [
            other for other in self.connections if other.stage in ("proven", "member") and other.place == place
        ]
        for other in older if rules.numbered else []:
            if not other.left:
                return self._reject(connection)
            if rules.end_first:
                self._ended(other)
            other.stage = "gone"
        if self.closed:
            return None
        connection.stage, connection.place, connection.proof = "proven", place, proof
        connection.to_reader.append(("WELCOME",))  # with the descriptor
        if connection.owner.place is None:
            self.violations.add("I7 read")

    def _admit(self, connection: Connection) -> None:
        if self.rules.proof and not connection.proof:
            return self._reject(connection)
        connection.stage = "member"
        if not self.rules.mapped_is_joined:
            connection.to_reader.append(("JOINED", len(self.tickets)))
        self.opened = self.opened or self._is_complete()

    def _reject(self, connection: Connection) -> None:
        connection.to_reader.append(("REJECT",))
        connection.cut = True
        connection.stage = "gone"

    def _ended(self, connection: Connection) -> None:
        was_member = connection.stage == "member"
        connection.stage = "gone"
        if was_member and self.opened and self.rules.ends_with_member:
            return self.close()
        for ticket in self.tickets:
            if connection in ticket.owed.get(connection.place[0], ()):
                self._settle(ticket, connection)

    def _members(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.stage == "member"]

    def _is_complete(self) -> bool:
        if self.rules.numbered:
            return {member.place for member in self._members()} >= set(EXPECTED)
        return Counter(member.place[0] for member in self._members()) >= Counter(group for group, _ in EXPECTED)

    @property
    def is_open(self) -> bool:
        return not self.closed and (self.opened if self.rules.ends_with_member else self._is_complete())

    # --- tickets at the producer ---------------------------------------------------------------------------

    def put(self, group: str, drain: bool) -> Ticket | None:
        """Issue a ticket. All of this happens without a step of any other party."""
        if drain and not self.closed:
            for member in self._members():
                while member.to_producer:
                    self._hear(member, *member.to_producer.popleft())
        if self.locked:
            self.violations.add("W put")
            return None
        if not self.is_open or None not in self.extents:
            return None
        owed = {name: {c for c in self._members() if c.place[0] == name} for name, _ in EXPECTED}
        counted = {member.owner for member in self._members()}
        replaced = {
            process.place for process in counted if process.place and self.ranks[process.place] is not process
        }
        # A process that took the place of a dead one that is still counted need not agree with the others.
        needed_by = {rank for place, rank in self.ranks.items() if place[0] == group and place not in replaced}
        extent = self.extents.index(None)
        ticket = self.extents[extent] = Ticket(len(self.tickets) + 1, extent, owed, needed_by, group)
        self.tickets.append(ticket)
        return ticket

    def out(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if not ticket.ended]

    def _release(self, member: Connection, ticket: Ticket) -> None:
        if not self.rules.by_serial:
            ticket = self.extents[ticket.extent] or ticket
        group = member.place[0]
        if member not in ticket.owed.get(group, ()):
            return
        if not ticket.claimed:
            ticket.claimed = True
            ticket.owed = {group: ticket.owed[group]}
        if not self.rules.all_owe:
            ticket.owed[group] = {member}
        self._settle(ticket, member)

    def _not_seen(self, member: Connection, ticket: Ticket) -> None:
        if member in ticket.owed.get(member.place[0], ()):
            self._settle(ticket, member)
            self.locked = ticket.ended and not self.rules.logs_after  # "a ticket was lost"

    def _settle(self, ticket: Ticket, member: Connection) -> None:
        ticket.owed[member.place[0]].remove(member)
        if not any(ticket.owed.values()):
            ticket.ended = True
            self.extents[ticket.extent] = None

    # --- ranks ---------------------------------------------------------------------------------------------

    def run(self, rank: Process) -> None:
        """The reader's thread of a rank takes a step."""
        connection = rank.connection
        if not self.is_busy(rank):
            return
        if rank.answering is not None:
            self._answer(rank, rank.answering)
        elif rank.handed:
            self._let_go_untaken(rank, rank.handed.popleft())
        elif rank.state == "about to know":
            rank.state = "joined"
        elif connection is None:
            rank.connection, rank.state = self.connect(rank), "waiting"
            rank.connection.to_producer.append(("HELLO", rank.place, True))
        elif connection.to_reader:
            self._handle(rank, *connection.to_reader.popleft())
        else:
            self._hang_up(rank, "ended" if rank.state == "joined" else "out")

    def is_busy(self, rank: Process) -> bool:
        """Whether the reader's thread of a rank has something to do."""
        connection = rank.connection
        if connection is None:
            return rank.state == "out" and not self.closed
        at_hand = rank.answering is not None or rank.handed or rank.state == "about to know"
        return bool(at_hand or connection.to_reader or connection.cut)

    def times_out(self, rank: Process) -> None:
        """A rank has waited long enough for the next message of the handshake."""
        if rank.alive and rank.state in ("waiting", "mapped"):
            self._hang_up(rank, "out")

    def forgets(self, rank: Process) -> None:
        """A rank has noticed that a lane is closed, and `linger` has passed since."""
        arrived = all(rank in ticket.took | ticket.refused for ticket in self.tickets if rank in ticket.needed_by)
        if self.closed and rank.state in ("joined", "ended") and (arrived or not self.rules.linger):
            self._hang_up(rank, "forgotten")

    def awaits(self, rank: Process, ticket: Ticket) -> bool:
        """Whether a ticket can still reach a rank."""
        done = ticket in rank.seen or ticket in rank.handed or rank in ticket.refused
        return rank.place is not None and rank.place[0] == ticket.group and rank.state != "left" and not done

    def take(self, rank: Process, ticket: Ticket) -> None:
        """A ticket has reached a rank."""
        if not self.awaits(rank, ticket) or self._would_wait(rank):
            return
        if self._claim(rank, ticket):
            rank.held.add(ticket)
            ticket.took.add(rank)
        else:
            ticket.refused.add(rank)

    def send(self, group: str, *ranks: Process) -> None:
        """A put whose ticket reaches these ranks at once."""
        ticket = self.put(group, drain=False)
        if ticket is not None:
            for rank in ranks:
                self.take(rank, ticket)

    def drop(self, rank: Process, ticket: Ticket) -> None:
        """A finalizer lets a ticket go that was not taken. It ends before any other party takes a step."""
        if not self.awaits(rank, ticket):
            return
        if self.rules.hands_over:
            rank.handed.append(ticket)
        elif self._would_wait(rank):
            self.violations.add("W drop")
        else:
            self._let_go_untaken(rank, ticket)

    def let_go(self, rank: Process, ticket: Ticket) -> None:
        """The last alias of a tensor is gone; or was, and an interrupt has RELEASE said once more."""
        rank.held.discard(ticket)
        self._say(rank, "RELEASE", ticket)

    def leaves(self, rank: Process) -> None:
        """A rank closes its reader. If its end frees what it owes, it must hold nothing by then."""
        if rank.alive and rank.state != "left" and (self.rules.ends_with_member or not rank.held):
            self._hang_up(rank, "left")

    def dies(self, rank: Process) -> None:
        self._hang_up(rank, "left")
        rank.alive = False
        rank.held.clear()

    def starts(self, place: Place) -> None:
        """A new process takes the place of one that is gone."""
        if self.ranks[place].state == "left":
            self.ranks[place] = Process(place)
            self.processes.append(self.ranks[place])

    def uninvited(self, visible: bool, *messages: tuple[Any, ...]) -> Connection:
        """A process of the same user, which knows the name and not the secret, connects and says something."""
        connection = self.connect(Process(visible=visible))
        connection.to_producer.extend(messages)
        return connection

    def connect(self, owner: Process) -> Connection:
        self.connections.append(Connection(owner))
        return self.connections[-1]

    def _handle(self, rank: Process, kind: str, *content: Any) -> None:
        match kind:
            case "WELCOME":
                joined = "joined" if self.rules.known_first else "about to know"
                rank.state = joined if self.rules.mapped_is_joined else "mapped"
                self._say(rank, "MAPPED")
            case "JOINED":
                (rank.floor,) = content
                rank.state = "joined"
            case "RECALL":
                (rank.answering,) = content
            case "REJECT" if rank.state != "joined":
                self._hang_up(rank, "out")

    def _answer(self, rank: Process, ticket: Ticket) -> None:
        rank.answering = None
        if ticket not in rank.seen or not self.rules.holder_is_silent:
            rank.promised.add(ticket)
            self._say(rank, "NOT_SEEN", ticket)

    def _hang_up(self, rank: Process, state: str) -> None:
        if rank.connection is not None:
            rank.connection.left = True
            rank.connection = None
        rank.state = "forgotten" if state == "out" and not self.rules.tries_again else state

    def _would_wait(self, rank: Process) -> bool:
        """Whether to claim a ticket waits for others: for JOINED, or for the lock of what was seen."""
        return rank.state == "mapped" or rank.answering is not None

    def _claim(self, rank: Process, ticket: Ticket) -> bool:
        promised = ticket in rank.promised and self.rules.promise_kept
        if rank.state not in ("joined", "ended") or ticket.serial <= rank.floor or ticket.ended or promised:
            return False
        rank.seen.add(ticket)
        return True

    def _let_go_untaken(self, rank: Process, ticket: Ticket) -> None:
        if ticket not in rank.seen and self._claim(rank, ticket):
            self._say(rank, "RELEASE", ticket)

    def _say(self, rank: Process, *message: Any) -> None:
        if rank.connection is not None and not rank.connection.cut:
            rank.connection.to_producer.append(message)

    # --- all -----------------------------------------------------------------------------------------------

    def meet(self, rank: Process, times: int = 8) -> None:
        """The producer attends to this rank only, perhaps until neither has anything to do."""
        for _ in range(times):
            self.run(rank)
            if rank.connection is not None:
                self.serve(rank.connection)
            self.check()

    def calm(self) -> None:
        """All parties run until none has anything to do. Silent uninvited processes are rejected."""
        self.log_handler_returns()
        for _ in range(12):
            for rank in self.processes:
                self.run(rank)
            for connection in list(self.connections):
                if connection.stage == "unproven" and not connection.to_producer:
                    self.give_up_on(connection)
                self.serve(connection)
        self.connections = [connection for connection in self.connections if connection.stage != "gone"]

    def check(self) -> set[str]:
        """Which invariants have not held by now."""
        found = self.violations
        if any(
            ticket.took & ticket.needed_by and ticket.refused & ticket.needed_by and not ticket.recalled
            for ticket in self.tickets
        ):
            found.add("I1")
        if any(self.extents[ticket.extent] is not ticket for process in self.processes for ticket in process.held):
            found.add("I2")
        if self.is_open and not {member.owner.place for member in self._members()} >= set(EXPECTED):
            found.add("I7 open")
        owing = {member for ticket in self.tickets for members in ticket.owed.values() for member in members}
        if any(member.owner.place is None for member in owing):
            found.add("I7 fill")
        return found

    def check_that_it_opens(self) -> set[str]:
        """At the end: whatever uninvited processes did, and whichever ranks had to start again, the lane opens."""
        for place in EXPECTED:
            self.starts(place)
        self.calm()
        self.calm()
        if not self.opened and not self.closed:
            self.violations.add("L")
        return self.violations
