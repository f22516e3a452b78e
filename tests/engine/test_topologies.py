"""Other processes, other relays, other ways through the scheduler: the same promises."""

from __future__ import annotations

import concurrent.futures
import functools
import re
import signal
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.images import jpeg
from tests.engine import asking, server_lanes
from tests.engine.asking import image
from tests.engine.request_kinds import AT_ONCE
from tests.engine.test_auxiliary import all_arrived
from tests.engine.test_failures import failing
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched import embeddings, sessions, small_memory
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

DEBUG = {"MMLANE_LOG": "debug"}
MODES = ["lane", pytest.param("backport", marks=pytest.mark.matrix)]


def roles(server: WatchedServer) -> list[str]:
    return sorted(re.findall(r"mmlane: \[\d+\] (\w+): sglang", server.log()))


def everything_is_answered(server: WatchedServer) -> None:
    """Each kind of request, several times over and at once, so that every replica and worker gets its share."""
    asks = [*AT_ONCE.values(), asking.one_image_n3, asking.two_images_n2] * 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {reply.status for reply in pool.map(lambda ask: ask(server), asks)} == {200}


def goes_by_lane(server: WatchedServer, producers: int) -> None:
    """Every producer opens its lane, and from then on nothing goes another way."""
    server_lanes.open_lanes(server, producers)
    before = server_lanes.lanes(server)
    everything_is_answered(server)
    after = server_lanes.lanes(server)
    assert [stats.fallbacks for stats in after] == [stats.fallbacks for stats in before]
    assert all(late.puts > early.puts for late, early in zip(after, before, strict=True))
    server_lanes.wait_for_baseline(server)
    assert server_lanes.features(server) == []


def survives_a_lost_segment(server: WatchedServer) -> None:
    everything_is_answered(server)
    lost = asking.ask_and_lose_the_segment(server)
    assert lost.status == 500, lost.body
    assert asking.ANSWERED["one image"](server).status == 200
    server_lanes.wait_for_no_features(server)


def modes(server: WatchedServer, mode: str, producers: int) -> None:
    if mode == "lane":
        goes_by_lane(server, producers)
    else:
        survives_a_lost_segment(server)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.16", "newest")
def test_data_parallel(release: str, mode: str, plugin_wheel: Path) -> None:
    """The data-parallel controller decodes every pointer and encodes it again; each replica is a reader group."""
    env = {**DEBUG, "MMLANE": mode}
    with WatchedServer(release, plugin=plugin_wheel, tp=1, args=["--dp", "2"], env=env) as server:
        modes(server, mode, 1)
        assert roles(server) == ["detokenizer", "dp_controller", "main", "scheduler", "scheduler"]
        assert mode == "backport" or server_lanes.lane(server).joined == {"dp0": [0], "dp1": [0]}


@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18")
def test_a_replica_on_another_node(release: str, plugin_wheel: Path) -> None:
    """The controller takes what goes there, and sends it inside of the request; all else it passes on."""
    probes = ["elsewhere", "auxiliary", "failures"]
    with WatchedServer(release, plugin=plugin_wheel, tp=1, args=["--dp", "2"], probes=probes) as server:
        goes_by_lane(server, 1)
        assert server_lanes.lane(server).joined == {"dp0": [0], "controller": [0]}
        all_arrived(server, answers=20)
        assert len(list(server.notes.glob("*.auxiliary"))) == 2  # of both replicas
        server.loses()
        with failing(server, "mmlane.lane.reader:Reader.take StaleTicket sglang::data_parallel_controller"):
            replies = [server.generate([asking.image(seed)], asking.TEXT) for seed in (1, 2)]
        assert sorted(reply.status for reply in replies) == [200, 500]
        everything_is_answered(server)
        server_lanes.wait_for_baseline(server)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.releases("0.5.18", "0.5.9", "0.5.12.post1", "newest")
def test_two_tokenizer_workers(release: str, mode: str, plugin_wheel: Path) -> None:
    """Two producers, and a main process that only manages them. 0.5.18 is the newest with every kind of patch."""
    arguments = ["--tokenizer-worker-num", "2"]
    env = {**DEBUG, "MMLANE": mode}
    probes = ["patience"] if Version(release) < Version("0.5.12") else []
    with WatchedServer(release, probes=probes, plugin=plugin_wheel, args=arguments, env=env) as server:
        # One worker is enough for the server to be ready; both shall serve.
        asking.wait_for(lambda: roles(server).count("tokenizer") == 2, lambda: f"both workers: {roles(server)}")
        modes(server, mode, 2)
        assert {"main", "scheduler", "detokenizer"} <= set(roles(server))
        if mode == "lane" and Version(release) >= Version("0.5.18"):
            a_worker_is_killed(server)


def a_worker_is_killed(server: WatchedServer) -> None:
    """Its lane goes with it; the other worker's lane is as before."""
    server.verify()
    victim, survivor = server_lanes.lanes(server)
    server.kill(victim.pid)
    asking.wait_for(lambda: server_lanes.names({victim.pid}) == [], "the lane's end")
    assert server_lanes.names({survivor.pid}) == [survivor.name]


def test_a_lane_that_is_too_small(plugin_wheel: Path) -> None:
    """What does not fit goes by segment, with one warning, and is counted; what fits goes by lane."""
    small = {**DEBUG, "MMLANE_CAPACITY_MB": "4"}
    with WatchedServer("0.5.12.post1", plugin=plugin_wheel, env=small) as server:
        server_lanes.open_lanes(server)
        for seed in range(3):
            assert server.generate([jpeg(640, 480, seed=seed)], asking.TEXT).status == 200
        assert server_lanes.lane(server).fallbacks["oversize"] == 3
        assert server.log().count("has no place for a feature (oversize)") == 1
        before = server_lanes.lane(server).puts
        assert server.generate([asking.image()], asking.TEXT).status == 200
        assert server_lanes.lane(server).puts == before + 1


def test_64_mib_of_shared_memory(plugin_wheel: Path, transcripts: Transcripts) -> None:
    """Docker's default: four 1280x720 images are a bus error without the plugin, and an answer with it."""
    unpatched = transcripts.of(small_memory.RELEASE, small_memory.small_memory)
    assert unpatched == {"answered": False, "ended by": "SIGBUS"}
    # With the lane, /dev/shm is not needed: the first request, which finds it too small, says where the lane is.
    with WatchedServer(small_memory.RELEASE, plugin=plugin_wheel, shm_bytes=small_memory.SIZE) as server:
        assert small_memory.four_images(server).status == 200
        asking.wait_for(lambda: server_lanes.lane(server).state == "open", "the lane")
        before = server_lanes.lane(server).puts
        assert small_memory.four_images(server).status == 200
        assert server_lanes.lane(server).puts == before + 5  # four images, and the positions of a long prompt
    flags = ["--mmlane", "backport", "--mmlane-strict"]
    with WatchedServer(
        small_memory.RELEASE, plugin=plugin_wheel, shm_bytes=small_memory.SIZE, args=flags, env=DEBUG
    ) as server:
        reply = small_memory.four_images(server)
        assert reply.status == 200, reply.body
        # The flags did not disturb the engine's parser, and reached every process.
        assert set(re.findall(r"mmlane: \[\d+\] \w+: sglang \S+, mode (\w+)", server.log())) == {"backport"}
        assert len(roles(server)) == 4
        assert server.log().count("docker run --shm-size") == 1
        assert asking.ANSWERED["one image"](server).status == 200


def collected(server: WatchedServer) -> bool:
    """0.5.9 keeps its last batch until the next, and lets a closed session go as a cycle of references."""
    assert asking.ANSWERED["text only"](server).status == 200
    for pid in server.find("sglang::scheduler"):
        server.kill(pid, signal.SIGUSR2)
    return server_lanes.lane(server).tickets == 0


@pytest.mark.releases(*sessions.RELEASES)
def test_sessions_and_retraction(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """A session keeps its image for the next turn; short of room for tokens, requests go and come back."""
    expected = transcripts.of(release, sessions.session)
    left_to_collector = Version(release) < Version("0.5.10")
    probes = ["collector"] if left_to_collector else []
    with WatchedServer(release, probes=probes, plugin=plugin_wheel, args=sessions.FEW_TOKENS) as server:
        server_lanes.open_lanes(server)
        assert sessions.ask_in_a_session(server) == expected
        if left_to_collector:
            asking.wait_for(lambda: collected(server), "the session's image")
        server_lanes.wait_for_baseline(server)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asks = [
                pool.submit(server.generate, [image(seed)], asking.TEXT, max_new_tokens=300) for seed in range(12)
            ]
            assert {ask.result().status for ask in asks} == {200}
        assert "retract" in server.log().lower()
        server_lanes.wait_for_baseline(server)


@pytest.mark.releases(*embeddings.RELEASES)
def test_an_embedding_model(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """Up to 0.5.14 their inputs have another name, and the engine sends them inside of the requests."""
    # A prompt that the engine has partly cached is computed in other shapes, and rounds otherwise.
    close = functools.partial(pytest.approx, rel=0, abs=1e-5)
    expected = transcripts.of(release, embeddings.embeddings)
    assert expected[0] != close(expected[1])
    with WatchedServer(release, plugin=plugin_wheel, args=embeddings.AS_EMBEDDING) as server:
        assert embeddings.embedding(server, embeddings.SEEDS[0]) == close(expected[0])
        asking.wait_for(lambda: server_lanes.lane(server).state == "open", "the lane")
        before = server_lanes.lane(server).puts
        for seed, wanted in zip(embeddings.SEEDS, expected, strict=True):
            assert embeddings.embedding(server, seed) == close(wanted)
        assert server_lanes.lane(server).puts == before + 2
        server_lanes.wait_for_baseline(server)
