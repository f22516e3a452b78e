"""A transport is added by a file, `probes/file_transport.py`, and an entry (`probes/probe_file_transport.py`).

From 0.5.19 on the server speaks msgpack between its processes, the other of the engine's two wires.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from tests.engine import asking, server_lanes
from tests.engine.request_kinds import ANSWERED
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

MSGPACK = Version("0.5.19")


@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18", "0.5.19", "0.5.21")
def test_images_travel_by_a_transport_that_was_added(
    release: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    """By segment, lane and file: answers are right, nothing stays, and what is lost fails its own request."""
    unpatched = transcripts.of(release, plain)
    wire = {"SGLANG_USE_PICKLE_IPC": "0"} if Version(release) >= MSGPACK else {}
    with WatchedServer(release, plugin=plugin_wheel, probes=["file_transport"], env=wire) as server:

        def answers_are_right() -> None:
            for name, ask in ANSWERED.items():
                reply = ask(server)
                assert reply.status == 200, (name, reply.body)
                assert asking.tokens(reply) == unpatched["answers"][name]["tokens"], name
            three = asking.one_image_n3(server)
            assert asking.tokens(three) == unpatched["pictures"]["4"]["tokens"] * 3

        lost = asking.ask_and_lose_the_segment(server)
        assert lost.status == 500, lost.body
        server_lanes.open_lanes(server)
        answers_are_right()
        by_lane = server_lanes.lane(server)
        assert by_lane.puts > 0 and set(by_lane.fallbacks) <= {"not_open"}

        with server_lanes.flag(server, "by_file"):
            answers_are_right()
            sent = (server.notes / "sent_by_file").read_text().splitlines()
            assert len(sent) > 4 and not any(Path(file).exists() for file in sent)
            assert server_lanes.lane(server).puts == by_lane.puts and server_lanes.features(server) == []
            server.loses()
            with asking.schedulers_stopped(server):
                answer = asking.in_background(lambda: server.generate([asking.image(7)], asking.TEXT))
                asking.wait_for(lambda: any(server.notes.glob("*.feature")), "the file")
                (file,) = server.notes.glob("*.feature")
                file.unlink()
            reply = answer.result(asking.WAIT_S)
            assert reply.status == 500, reply.body
            assert server.log().count(f"{file}") >= server.tp
            answers_are_right()
        assert not any(server.notes.glob("*.feature"))
