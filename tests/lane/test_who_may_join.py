"""Which processes get a lane's memory: those that know its secret, run as the same user, and are visible (7)."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import signal
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import TracebackException

import pytest
import torch

from mmlane.lane import (
    Invitation,
    JoinRefused,
    Lane,
    LaneError,
    MalformedInvitation,
    Reader,
    StatusError,
    protocol,
)
from mmlane.lane.peer import uid_is_proof
from mmlane.lane.status import ask, switch
from tests.lane.harness.child import Child, Failed, die_with_the_parent, run
from tests.lane.harness.confinement import OTHER_UID, become, require_other_users
from tests.lane.harness.kernel import lane_files, open_files
from tests.lane.harness.lane_with_readers import new_tensor, put, serves
from tests.lane.harness.libc import checked, libc
from tests.lane.harness.sockets import MAPPED, hello, invitation_without_lane, receive, visit
from tests.lane.harness.waiting import eventually

MIB = 1 << 20
_CLONE_NEWUSER, _CLONE_NEWPID = 0x10000000, 0x20000000

# --- the secret --------------------------------------------------------------------------------------------


def renamed(message: bytes, **changed: object) -> bytes:
    """A HELLO that says something else than what its proof is for."""
    return message[:3] + json.dumps({**json.loads(message[3:]), **changed}).encode()


# What a process says that does not know the secret, but all else: the name, other lanes' messages, the protocol.
UNPROVEN: dict[str, Callable[[Invitation], list[bytes]]] = {
    "a guessed secret": lambda lane: [hello(Invitation.make(lane.name))],
    "an empty secret": lambda lane: [hello(Invitation(lane.name, b""))],
    "the name as the secret": lambda lane: [hello(Invitation(lane.name, lane.name.encode()))],
    "a HELLO of another lane": lambda lane: [hello(invitation_without_lane())],
    "another group than was proven": lambda lane: [renamed(hello(lane, "pp"), group="tp")],
    "another number than was proven": lambda lane: [renamed(hello(lane, "tp", 1), number=0)],
    "another nonce than was proven": lambda lane: [renamed(hello(lane), nonce="twice")],
    "no proof": lambda lane: [renamed(hello(lane), proof="")],
    "a proof of a WELCOME": lambda lane: [
        renamed(hello(lane), proof=json.loads(protocol.welcome(lane.secret, "once", 1, 1, "")[1:])["proof"])
    ],
    "no HELLO, but MAPPED": lambda lane: [MAPPED],
    "no HELLO, but MAPPED and releases": lambda lane: [MAPPED, protocol.pairs(protocol.RELEASE, [(0, 0)])],
    "a wrong HELLO, then MAPPED": lambda lane: [hello(Invitation.make(lane.name)), MAPPED],
    "a wrong HELLO, then a good one": lambda lane: [hello(Invitation.make(lane.name)), hello(lane)],
    "the HELLO of protocol 2": lambda lane: [b"\x01\x02\x00tp"],
}


@pytest.mark.parametrize("words", UNPROVEN.values(), ids=UNPROVEN.keys())
def test_no_process_without_the_secret_gets_the_memory(
    lane: Lane, words: Callable[[Invitation], list[bytes]]
) -> None:
    before = open_files()
    with visit(lane.name) as connection:
        with suppress(ConnectionError):  # sent away after the first word
            for word in words(lane.invitation):
                connection.send(word)
        answer, fds = receive(connection)
        assert protocol.kind(answer) == protocol.REJECT and not fds
        assert receive(connection) == (b"", [])  # it hangs up
    stats = lane.stats()
    assert (stats.rejected_peers, stats.joined, stats.state) == (1, {"tp": []}, "waiting")
    assert not open_files() - before
    serves(lane)


def test_a_reader_with_another_secret_is_told_so(lane: Lane) -> None:
    before = lane_files(os.getpid())
    with Reader("tp") as reader:
        with pytest.raises(JoinRefused, match="you do not know this lane's secret"):
            reader.join(Invitation.make(lane.name))
        assert reader.lanes() == () and not lane_files(os.getpid()) - before
    serves(lane)


def test_a_rejection_names_expected_readers_only_to_a_process_that_knows_the_secret(lane: Lane) -> None:
    """Only a process that knows the secret learns what groups and numbers there are."""
    with visit(lane.name) as connection:
        connection.send(hello(Invitation.make(lane.name), "unknown", 7))
        assert "tp" not in protocol.read_reject(receive(connection)[0])
    with visit(lane.name) as connection:
        connection.send(hello(lane.invitation, "unknown", 7))
        assert "reader 0 of 'tp'" in protocol.read_reject(receive(connection)[0])


def test_every_lane_has_another_secret() -> None:
    secrets = {Invitation.make("x").secret for _ in range(1000)}
    assert len(secrets) == 1000 and {len(secret) for secret in secrets} == {32}


def test_an_invitation_there_and_back(lane: Lane) -> None:
    assert Invitation.parse(bytes(lane.invitation)) == lane.invitation
    assert lane.invitation.name == lane.name


def of_version(good: bytes, version: int) -> bytes:
    at = good.index(b"*") - 2
    return good[:at] + struct.pack("<H", version) + good[at + 2 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda good: b"", "not an invitation: bytes"),
        (lambda good: good.decode("latin-1"), "not an invitation: str"),
        (lambda good: b"mmlane-1-abcdef", "not an invitation: bytes"),  # an address of protocol 2
        (lambda good: good[: good.index(b"*") - 1], "not an invitation: bytes"),
        (lambda good: b"x" + good[1:], "not an invitation: bytes"),
        (lambda good: of_version(good, 2), "an invitation of protocol 2, this mmlane speaks 3"),
        (lambda good: of_version(good, 4), "an invitation of protocol 4, this mmlane speaks 3"),
        (lambda good: good[: good.index(b"*")], "damaged"),
        (lambda good: good[: good.index(b"*") + 32], "damaged"),
        (lambda good: good + b"\xff", "damaged"),
        (lambda good: good + b"x" * 100, "damaged"),
    ],
)
def test_the_error_for_a_malformed_invitation_does_not_quote_it(
    damage: Callable[[bytes], object], reason: str
) -> None:
    good = Invitation("mmlane-1-abcdef", b"*" * 32)
    with pytest.raises(MalformedInvitation, match=reason) as caught:
        Invitation.parse(damage(bytes(good)))
    assert "***" not in str(caught.value)


# --- where the secret must not be --------------------------------------------------------------------------


def shapes(secret: bytes) -> list[bytes]:
    """A secret as it may look where it got out."""
    return [
        secret,
        repr(bytes(secret))[2:-1].encode(),
        secret.hex().encode(),
        base64.b64encode(secret),
        base64.urlsafe_b64encode(secret),
        str(list(secret))[1:-1].encode(),
        json.dumps(secret.decode("latin-1"))[1:-1].encode(),
    ]


def test_the_secret_is_nowhere_but_in_the_invitation(caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs of any level, names, statistics, tickets, refusals and errors, nor in what they pickle to."""
    told: list[object] = []
    with caplog.at_level(logging.DEBUG), Lane({"tp": 1}, capacity=4 * MIB) as lane, Reader("tp") as reader:
        told += [lane.put(torch.zeros(3)), lane.name, repr(lane), str(lane), f"{lane.invitation}", repr(reader)]
        told += [repr(lane.invitation), f"{lane.invitation!s:>500}", repr({"lane": lane.invitation})]
        for words in UNPROVEN.values():
            with visit(lane.name) as connection, suppress(ConnectionError):
                for word in words(lane.invitation):
                    connection.send(word)
                told.append(receive(connection)[0])
        with Reader("pp") as other:
            told.append(raised(lambda: other.join(lane.invitation)))
            told.append(raised(lambda: other.join(Invitation.make(lane.name))))
        with visit(lane.name) as connection:
            connection.send(hello(lane.invitation))
            welcome, (fd,) = receive(connection)
            os.close(fd)
            told += [welcome, hello(lane.invitation)]
            told.append(raised(lambda: reader.join(lane.invitation)))  # it is here already
            connection.send(protocol.reject("no room"))
            assert receive(connection)
        reader.join(lane.invitation)
        assert lane.wait_open()
        ticket = put(lane, new_tensor())
        told += [ticket, *(thread.name for thread in threading.enumerate()), Path("/proc/net/unix").read_bytes()]
        told += [lane.put(torch.zeros(4 * MIB)), lane.stats(), asdict(lane.stats()), ask(lane.name)]
        told += [switch(lane.name, True), lane.put(torch.zeros(3)), switch(lane.name, False)]
        told.append(raised(lambda: Invitation.parse(bytes(lane.invitation)[:30])))
        reader.discard(ticket)
        eventually(lambda: lane.stats().tickets == 0, "the ticket is released")
    told += [raised(lambda: reader.join(lane.invitation)), lane.put(torch.zeros(3))]
    told += [repr(vars(record)) for record in caplog.records]
    assert len(caplog.records) > len(UNPROVEN)
    for one in told:
        texts = [one if isinstance(one, bytes) else pickle.dumps(one), repr(one).encode(), str(one).encode()]
        for shape in shapes(lane.invitation.secret):
            assert not any(shape in text for text in texts), one


def test_no_traceback_shows_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that shows the values of all names, as error trackers do."""
    monkeypatch.setattr(protocol, "_same", lambda proof, expected: False)
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, Reader("tp") as reader:
        monkeypatch.setattr(protocol, "is_proven", lambda hello, secret: True)
        error = raised(lambda: reader.join(lane.invitation))
    told = "".join(TracebackException.from_exception(error, capture_locals=True).format())
    assert "proves no knowledge of the secret" in told and "_map" in told and "secret = <secret>" in told
    for shape in shapes(lane.invitation.secret):
        assert shape not in told.encode()


def raised(what: Callable[[], object]) -> LaneError:
    """What something raises."""
    with pytest.raises(LaneError) as caught:
        what()
    return caught.value


# --- the memory --------------------------------------------------------------------------------------------


def open_again_as_another_user(pipe: Connection) -> dict[str, list[str]]:
    """Have a lane's descriptor, become another user, and open it anew. And the same with a file for all."""
    with Lane({"tp": 1}, capacity=4 * MIB) as lane, visit(lane.name) as connection:
        connection.send(hello(lane.invitation))
        (fd,) = receive(connection)[1]
        for_all = os.memfd_create("mmlane-test")
        os.fchmod(for_all, 0o666)
        become(OTHER_UID)
        checked(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE: else /proc/self/fd is closed to the process itself
        found: dict[str, list[str]] = {"lane": [], "for all": []}
        for name, number in (("lane", fd), ("for all", for_all)):
            for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY):
                try:
                    os.close(os.open(f"/proc/self/fd/{number}", flags))
                    found[name].append("opened")
                except OSError as error:
                    found[name].append(type(error).__name__)
        return found


def test_the_memory_is_closed_to_other_users(lane: Lane) -> None:
    """Also to one that has got hold of the descriptor: it cannot be opened again, for writing say."""
    assert lane._committer.memory is not None
    assert stat.S_IMODE(os.fstat(lane._committer.memory.backing.fd).st_mode) == 0o600
    require_other_users()
    with Child(open_again_as_another_user) as child:
        assert child.result() == {"lane": ["PermissionError"] * 3, "for all": ["opened"] * 3}


# --- other users -------------------------------------------------------------------------------------------


def knock(pipe: Connection, uid: int | None, name: str, words: list[bytes]) -> list[tuple[bytes, int, bool]]:
    """As another user: say each of these on a connection of its own. Answers, descriptors, and whether it ends."""
    if uid is not None:
        become(uid)
    found = []
    for word in words:
        with visit(name) as connection:
            with suppress(ConnectionError):  # sent away before it could say a word
                connection.send(word)
            answer, fds = receive(connection)
            found.append((answer, len(fds), receive(connection) == (b"", [])))
    return found


def test_another_user_gets_nothing_even_with_the_secret(lane: Lane) -> None:
    require_other_users()
    words = [hello(lane.invitation), *(bytes((kind,)) for kind in (protocol.STATUS, protocol.OFF, protocol.ON))]
    with Child(knock, OTHER_UID, lane.name, words) as child:
        for answer, fds, ended in child.result():
            assert (fds, ended) == (0, True)
            assert f"you are user {OTHER_UID}" in protocol.read_reject(answer)
    assert (lane.stats().rejected_peers, lane.stats().state) == (len(words), "waiting")
    serves(lane)


# --- the overflow user -------------------------------------------------------------------------------------


def serve_as_the_overflow_user(pipe: Connection) -> None:
    """A producer in a user namespace where its own id is the one of all users that have none there."""
    uid = os.geteuid()
    checked(libc.unshare(_CLONE_NEWUSER))
    die_with_the_parent()
    Path("/proc/self/uid_map").write_text(f"{OTHER_UID} {uid} 1")
    assert os.geteuid() == OTHER_UID and not uid_is_proof()
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        pipe.send(lane.invitation)
        pipe.recv()
        pipe.send(lane.stats())
        with Reader("tp") as reader:
            reader.join(lane.invitation)
            serves(lane, reader)
            pipe.send(str(raised(lambda: ask(lane.name))))
            pipe.send(str(raised(lambda: switch(lane.name, True))))
            pipe.send(lane.state)


def _try_the_overflow_user() -> None:
    checked(libc.unshare(_CLONE_NEWUSER))


def test_where_the_uid_proves_nothing_the_secret_decides() -> None:
    """A user that is not in the producer's namespace looks like its own; without the secret it gets nothing."""
    require_other_users()
    try:
        run(_try_the_overflow_user)
    except Failed as failure:
        pytest.skip(f"no user namespaces here: {str(failure).splitlines()[-1]}")
    with Child(serve_as_the_overflow_user) as producer:
        invitation = producer.hear()
        words = [
            hello(Invitation.make(invitation.name)),
            MAPPED,
            bytes((protocol.STATUS,)),
            bytes((protocol.OFF,)),
            bytes((protocol.ON,)),
        ]
        with Child(knock, 4711, invitation.name, words) as child:
            answers = child.result()
        assert [(protocol.kind(answer), fds, ended) for answer, fds, ended in answers] == [
            (protocol.REJECT, 0, True)
        ] * len(words)
        for answer, _, _ in answers[2:]:
            assert "it runs as the overflow user" in protocol.read_reject(answer)
        producer.say()
        stats = producer.hear()
        assert (stats.rejected_peers, stats.joined, stats.state) == (len(words), {"tp": []}, "waiting")
        for _ in range(2):
            assert "it runs as the overflow user" in producer.hear()
        assert producer.hear() == "open"
        producer.result()


# --- processes that cannot be seen -------------------------------------------------------------------------


def serve_out_of_sight(pipe: Connection) -> None:
    """A producer that is the first process of a PID namespace: it sees its children alone."""
    checked(libc.unshare(_CLONE_NEWPID))
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return
    die_with_the_parent()
    assert os.getpid() == 1
    with Lane({"tp": 1}, capacity=4 * MIB) as lane:
        pipe.send(lane.invitation)
        pipe.recv()
        pipe.send(lane.stats())
        if (pid := os.fork()) == 0:
            with Reader("tp") as reader:
                reader.join(pipe.recv())
                pipe.recv()
                os.kill(os.getpid(), signal.SIGKILL)
        assert lane.wait_open()
        pipe.send(lane.stats())
        pipe.send(ask(lane.name).state)
    os._exit(0)


def test_a_process_out_of_sight_is_refused_even_with_the_secret() -> None:
    """One of another container, say, that shares the network alone. Inside, all goes on."""
    require_other_users()
    with Child(serve_out_of_sight) as producer:
        invitation = producer.hear()
        reason = "your process is in a PID namespace out of its sight: ask inside its container"
        with Reader("tp") as reader, pytest.raises(JoinRefused, match=reason):
            reader.join(invitation)
        with pytest.raises(StatusError, match=reason):
            ask(invitation.name)
        with pytest.raises(StatusError, match=reason):
            switch(invitation.name, True)
        with visit(invitation.name) as connection:
            answer, fds = receive(connection)
            assert reason in protocol.read_reject(answer) and not fds
        producer.say()
        stats = producer.hear()
        assert (stats.rejected_peers, stats.joined, stats.state) == (4, {"tp": []}, "waiting")
        producer.say(invitation)
        stats = producer.hear()
        assert (stats.rejected_peers, stats.joined, stats.state) == (4, {"tp": [0]}, "open")
        assert producer.hear() == "open"
        producer.say()
        producer.result()


# --- processes in a namespace of ours ----------------------------------------------------------------------


def switch_from_within(name: str) -> list[str]:
    """What a process in a PID namespace of its own, whose pid we see, is told."""
    checked(libc.unshare(_CLONE_NEWPID))
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            lines = pipe.read().splitlines()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return lines
    die_with_the_parent()
    assert os.getpid() == 1
    told = [str(raised(partial(switch, name, off))) for off in (True, False)] + [ask(name).state]
    os.write(theirs, "\n".join(told).encode())
    os._exit(0)


def test_a_process_in_a_container_within_ours_can_ask_but_not_switch(lane: Lane) -> None:
    """It shares the network, and the engine runs outside of any container."""
    require_other_users()
    *refused, state = run(switch_from_within, lane.name)
    assert all("only from its own container" in line for line in refused) and len(refused) == 2
    assert state == lane.state == "waiting"
    serves(lane)
