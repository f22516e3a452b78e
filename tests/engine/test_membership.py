"""The members of a server's lane are its ranks, all of them, whatever stands still or comes along as they join.

The lane opens when every rank has joined; until then features travel by segment, and no request is lost.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mmlane.lane import failpoints, protocol
from tests.engine import asking, server_lanes
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.18", "newest"),
]

JOINING = [point for point in failpoints.READER if point.startswith("join.")]
ACCEPTING = [point for point in failpoints.PRODUCER if point.startswith("accept.")]


def as_ever(server: WatchedServer, release: str, transcripts: Transcripts) -> None:
    """Its lane is that of its two ranks, and its answers are those of a server without mmlane."""
    assert server_lanes.lane(server).joined == {"dp0": [0, 1]}
    assert set(server_lanes.lane(server).fallbacks) == {"not_open"}
    unpatched = transcripts.of(release, plain)["pictures"]["4"]["tokens"]
    assert asking.tokens(server.generate([asking.image(4)], asking.TEXT)) == unpatched
    server_lanes.wait_for_baseline(server)


def where(server: WatchedServer, point: str) -> int:
    """The process that stands still at a point."""
    (mark,) = server.notes.glob(f"{point}.*")
    return int(mark.name.rsplit(".", 1)[1])


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.matrix
def test_standing_still_at_every_step_of_joining(
    release: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    """One rank and the tokenizer are stopped at each named point, in turn, for as long as the others like."""
    with WatchedServer(release, plugin=plugin_wheel, probes=["handshake"]) as server:
        lines = [f"{point} stop scheduler_TP1" for point in JOINING]
        lines += [f"{point} stop" for point in ACCEPTING if point != "accept.joined"]
        (server.notes / "stand").write_text("\n".join(lines))
        opening = asking.in_background(lambda: server_lanes.open_lanes(server))
        left = {line.split()[0] for line in lines}

        def go_on() -> bool:
            """Whatever stands still goes on."""
            for point in list(left):
                with suppress(ValueError):  # no peer has come there yet
                    pid = where(server, point)
                    if is_stopped(pid):
                        server.kill(pid, signal.SIGCONT)
                        left.discard(point)
            return not left

        asking.wait_for(go_on, lambda: f"a process to come to {left}")
        opening.result(asking.WAIT_S)
        as_ever(server, release, transcripts)


@pytest.mark.matrix
@pytest.mark.parametrize("point", ["accept.connected", "accept.proven"])
def test_a_tokenizer_that_holds_its_lock_longer_than_ranks_wait(
    release: str, point: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    """The rank gives up waiting, and tries again; neither takes it for a member before it is one."""
    with WatchedServer(release, plugin=plugin_wheel, probes=["handshake"]) as server:
        (server.notes / "stand").write_text(f"{point} hold")
        server_lanes.open_lanes(server)
        assert where(server, point)
        as_ever(server, release, transcripts)


@contextmanager
def strangers(server: WatchedServer) -> Iterator[None]:
    """Processes of this user that know the name of the lane, from /proc/net/unix, try to join all the time."""
    over = threading.Event()
    group = b"dp0"
    greetings = (
        protocol.hello(secrets.token_bytes(32), "dp0", 1, "nonce"),
        bytes((protocol.HELLO,)) + struct.pack("<H", 2) + group,  # protocol 2, which had no secret
        bytes((protocol.MAPPED,)),
    )

    def try_to_join() -> None:
        while not over.wait(0.001):
            for name in server_lanes.names({process.pid for process in server.processes()}):
                for greeting in greetings:
                    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                        connection.settimeout(1.0)
                        connection.connect(f"\0{name}")
                        connection.send(greeting)
                        message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
                        for fd in fds:
                            os.close(fd)
                        got.append((message[:1], len(fds)))

    got: list[tuple[bytes, int]] = []
    thread = threading.Thread(target=try_to_join)
    thread.start()
    try:
        yield
        asking.wait_for(lambda: len(got) > 10, "peers without the secret")
    finally:
        over.set()
        thread.join()
    assert {fds for _, fds in got} == {0}, "a peer without the secret got the memory"
    assert {message for message, _ in got} <= {bytes((protocol.REJECT,)), b""}


def test_peers_without_the_secret_change_nothing(
    release: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    """They neither stand in for a rank, nor get the memory, nor keep the lane from opening."""
    with WatchedServer(release, plugin=plugin_wheel) as server:
        with strangers(server):
            server_lanes.open_lanes(server)
            as_ever(server, release, transcripts)
        assert server_lanes.lane(server).rejected_peers > 0
