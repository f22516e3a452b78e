"""One engine over several nodes: features cross to each of the others once, and nothing else changes.

The nodes are network namespaces with a /dev/shm each. What the unpatched engine answers on one node, with as many
ranks or fewer, is what is expected.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from devkit.checkpoint import tiny_qwen2_5_vl
from devkit.client import Reply
from devkit.images import jpeg
from mmlane import __version__
from tests.engine import asking
from tests.engine.on_nodes import CROSSING, WatchedNodes
from tests.engine.test_auxiliary import BY_MESSAGES, all_arrived
from tests.engine.test_failures import failing
from tests.engine.test_launches import by_tokens
from tests.engine.test_versions import changed_wheel
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched import embeddings
from tests.engine.unpatched.plain import answer, plain
from tests.engine.unpatched.stages import ENV, answers, stages
from tests.engine.watching import PROBES

pytestmark = pytest.mark.engine

FOUR = pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18")
ENDS_S = 180.0  # from 0.5.14 on the main process waits a minute for core dumps


@cache
def four_images() -> list[bytes]:
    """Made when they are needed, which takes an engine's environment."""
    return [jpeg(640, 480, seed=seed) for seed in range(20, 24)]


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.matrix), 4])
@FOUR
def test_every_feature_crosses_once(release: str, tp: int, plugin_wheel: Path, transcripts: Transcripts) -> None:
    unpatched = transcripts.of(release, plain)
    with WatchedNodes(release, tp=tp, plugin=plugin_wheel, probes=["messages"]) as server:
        before_it_is_open = server.generate([asking.image(4)], asking.TEXT)
        server.open_lanes()
        text_makes_no_message(server)
        assert server.lane(0).expected_readers == server.lane(1).expected_readers == {"dp0": tp // 2}
        first = server.lane(0)
        for name, ask in asking.ANSWERED.items():
            assert answer(ask(server)) == unpatched["answers"][name], name
        for seed, wanted in unpatched["pictures"].items():
            assert answer(server.generate([asking.image(int(seed))], asking.TEXT)) == wanted
        assert asking.tokens(before_it_is_open) == unpatched["pictures"]["4"]["tokens"]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asks = [asking.one_image_n3, asking.two_images_n2, *asking.ANSWERED.values()] * 2
            assert {reply.status for reply in pool.map(lambda ask: ask(server), asks)} == {200}
        after = server.lane(0)
        assert after.puts > first.puts and after.fallbacks == first.fallbacks
        assert not any(server.lane(1).fallbacks.values())
        once = crossing(server, lambda: large(server))
        assert once.arrived <= 1.05 * once.payload
        several = crossing(server, lambda: large(server, 8))
        assert several.arrived <= 1.05 * several.payload and several.payload == once.payload
        server.wait_for_baseline()


def text_makes_no_message(server: WatchedNodes) -> None:
    """Of mmlane, between ranks, but for the heartbeats of an idle link."""

    def counted() -> tuple[int, int]:
        found = server.messages()
        beats = sum(count for line, count in found.items() if line.endswith("heartbeat"))
        return found.total() - beats, beats

    before, _ = counted()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asks = [pool.submit(server.generate, [], asking.TEXT) for _ in range(20)]
        assert {ask.result().status for ask in asks} == {200}
    now, beats = counted()
    assert now == before, server.messages()
    asking.wait_for(lambda: counted()[1] > beats, "a heartbeat")
    assert server.generate([asking.image()], asking.TEXT).status == 200
    assert counted()[0] > now, "the probe sees nothing"


def still_answers(server: WatchedNodes) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asks = [asking.one_image_n3, asking.two_images_n2, *asking.ANSWERED.values()]
        assert {reply.status for reply in pool.map(lambda ask: ask(server), asks)} == {200}


@pytest.mark.matrix
@pytest.mark.parametrize("args", [["--tokenizer-worker-num", "2"], ["--sleep-on-idle"]], ids=lambda args: args[0])
@FOUR
def test_other_launches(release: str, args: list[str], plugin_wheel: Path) -> None:
    with WatchedNodes(release, plugin=plugin_wheel, args=args) as server:
        server.open_lanes()
        still_answers(server)
        server.wait_for_baseline()


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.12.post1", "0.5.16")  # which have a transcript of two stages; 0.5.9 cannot
def test_a_pipeline_over_four_nodes(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    """Two stages of two nodes each: features cross within the first."""
    wanted = transcripts.of(release, stages)["answers"]
    args = ["--model-path", str(tiny_qwen2_5_vl()), "--pp-size", "2"]
    with WatchedNodes(release, nodes=4, plugin=plugin_wheel, args=args, env=ENV) as server:
        server.open_lanes()
        assert answers(server) == wanted
        assert [len(server.lanes(node)) for node in range(4)] == [1, 1, 0, 0]
        server.wait_for_baseline()


@pytest.mark.matrix
@FOUR
def test_a_node_whose_lane_has_no_room(release: str, plugin_wheel: Path) -> None:
    """Features still cross once: into the leader's memory, and from there to the other ranks of the node."""
    env_of = {1: {"MMLANE_CAPACITY_MB": "1"}}  # too small for a large image; the least is 4
    with WatchedNodes(release, tp=4, plugin=plugin_wheel, env_of=env_of) as server:
        server.open_lanes()
        once = crossing(server, lambda: large(server))
        assert once.arrived <= 1.05 * once.payload
        still_answers(server)
        server.wait_for_baseline()
        assert server.lane(1).fallbacks["oversize"] > 0


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["without mmlane", "MMLANE=off", "MMLANE=backport"])
@FOUR
def test_a_node_that_does_not_take_part(release: str, how: str, plugin_wheel: Path) -> None:
    """It is sent what the engine sends: tensors inside of requests. One line says so."""
    name, _, mode = how.partition("=")
    env_of = {1: {name: mode}} if mode else {}
    with WatchedNodes(release, plugin=plugin_wheel, env_of=env_of, plain=[] if mode else [1]) as server:
        still_answers(server)

        def is_said() -> bool:
            assert server.generate([asking.image()], asking.TEXT).status == 200
            return "not all ranks run mmlane in mode lane" in server.log()

        asking.wait_for(is_said, "the line", 2 * asking.WAIT_S)
        still_answers(server)
        assert CROSSING not in server.log()
        assert server.lane(0).tickets == 0


@FOUR
def test_a_lost_feature_fails_its_request_on_every_node(release: str, plugin_wheel: Path) -> None:
    with WatchedNodes(release, tp=4, plugin=plugin_wheel, probes=["failures"]) as server:
        server.open_lanes()
        wanted = answer(server.generate([asking.image(1)], asking.TEXT))
        server.loses()
        with failing(server, "mmlane.lane.reader:Reader.take StaleTicket scheduler_TP0"):
            assert server.generate([asking.image(2)], asking.TEXT).status == 500
        assert answer(server.generate([asking.image(1)], asking.TEXT)) == wanted
        server.wait_for_baseline()
        leader_stands_still(server)
        assert answer(server.generate([asking.image(1)], asking.TEXT)) == wanted
        server.wait_for_baseline()


def leader_stands_still(server: WatchedNodes) -> None:
    """Requests wait, and are answered when it goes on."""
    (leader,) = server.find("sglang::scheduler_TP2")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        server.kill(leader, signal.SIGSTOP)
        replies = [pool.submit(server.generate, [asking.image(seed)], asking.TEXT) for seed in range(4)]
        concurrent.futures.wait(replies, 5)
        assert not any(reply.done() for reply in replies)
        server.kill(leader, signal.SIGCONT)
        assert {reply.result(asking.WAIT_S).status for reply in replies} == {200}


@pytest.mark.matrix
@pytest.mark.parametrize("victim", ["first", "leader", "peer", "node"])
@FOUR
def test_a_rank_that_ends_on_any_node_ends_the_engine(release: str, victim: str, plugin_wheel: Path) -> None:
    """With features on their way to the other node."""
    with WatchedNodes(release, tp=4, plugin=plugin_wheel) as server:
        server.open_lanes()
        ranks = [pid for rank in range(4) for pid in server.find(f"sglang::scheduler_TP{rank}")]
        victims = {"first": ranks[:1], "leader": ranks[2:3], "peer": ranks[3:]}.get(victim) or [
            process.pid for process in server.node(1)
        ]
        server.breaks()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            server.kill(ranks[2], signal.SIGSTOP)
            replies = [pool.submit(server.generate, four_images(), asking.TEXT) for _ in range(4)]
            asking.wait_for(lambda: server.lane(0).tickets, "features on their way")
            for pid in victims:
                server.kill(pid)
            server.kill(ranks[2], signal.SIGCONT)
            asking.wait_for(lambda: not server.find("sglang::scheduler"), "the end of all ranks", ENDS_S)
            server.stop()
            assert all(reply.result(asking.WAIT_S).status != 200 for reply in replies)


@pytest.mark.matrix
@FOUR
def test_without_a_tokenizer(release: str, plugin_wheel: Path) -> None:
    """--skip-tokenizer-init: the engine neither makes pointers nor takes them."""
    five = [asking.image(seed) for seed in range(5)]
    with WatchedNodes(release, tp=4, plugin=plugin_wheel, args=["--skip-tokenizer-init"]) as server:
        inline = by_tokens(server, five)
        assert inline.status == 200, inline.body
        server.open_lanes(lambda: by_tokens(server, [asking.image()]))
        assert asking.tokens(by_tokens(server, five)) == asking.tokens(inline)
        one = asking.tokens(by_tokens(server, [asking.image(7)]))
        assert asking.tokens(by_tokens(server, [asking.image(7)], n=3)) == one * 3
        once = crossing(server, lambda: by_tokens(server, four_images(), max_new_tokens=1))
        assert once.arrived <= 1.05 * once.payload
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asks = [pool.submit(by_tokens, server, [asking.image(seed)]) for seed in range(24)]
            assert {ask.result().status for ask in asks} == {200}
        server.wait_for_baseline()


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1", "0.5.18", *BY_MESSAGES)
def test_lists_embeddings_and_auxiliary_tensors(
    release: str, plugin_wheel: Path, transcripts: Transcripts
) -> None:
    """Each is on every rank what it was, which the probes compare; on two releases by the engine's other wire."""
    unpatched = transcripts.of(release, plain)["answers"]
    env = {"SGLANG_USE_PICKLE_IPC": "0"} if release in BY_MESSAGES else {}
    with WatchedNodes(release, tp=4, plugin=plugin_wheel, probes=["auxiliary", "lists"], env=env) as server:
        inline = embedded(server, 0)
        server.open_lanes()
        assert embedded(server, 0) == inline != embedded(server, 1)
        for name, ask in asking.ANSWERED.items():
            assert asking.tokens(ask(server)) == unpatched[name]["tokens"], name
        one = asking.tokens(server.generate([asking.image(4)], asking.TEXT))
        assert asking.tokens(asking.one_image_n3(server)) == one * 3
        before = lanes(server)
        once = crossing(server, lambda: large(server))
        assert once.arrived <= 1.05 * once.payload
        embedded(server, 2)
        first, second = (late.puts - early.puts for late, early in zip(lanes(server), before, strict=True))
        # Of each item two parts of its feature and four auxiliary tensors; 0.5.9 has one item for all images.
        items = 1 if release == "0.5.9" else len(four_images())
        assert first == second >= 5 * items * 6
        for _ in range(2):  # a batch that is empty keeps its embeddings until one or two others have come
            server.generate([], asking.TEXT)
        server.wait_for_baseline()
        all_arrived(server, answers=10)


def lanes(server: WatchedNodes) -> tuple[Any, Any]:
    return server.lane(0), server.lane(1)


def embedded(server: WatchedNodes, number: int) -> list[list[int]]:
    """The tokens of the answer about an image that is sent as embeddings, with the probe `lists`."""
    return asking.tokens(server.generate(four_images()[number : number + 1], "As embeddings."))


@pytest.mark.matrix
@pytest.mark.releases(*embeddings.RELEASES)
def test_an_embedding_model(release: str, plugin_wheel: Path, transcripts: Transcripts) -> None:
    close = functools.partial(pytest.approx, rel=0, abs=1e-5)
    expected = transcripts.of(release, embeddings.embeddings)
    with WatchedNodes(release, plugin=plugin_wheel, args=embeddings.AS_EMBEDDING) as server:
        assert embeddings.embedding(server, embeddings.SEEDS[0]) == close(expected[0])
        server.open_lanes(lambda: embeddings.embedding(server, embeddings.SEEDS[0]))
        before = lanes(server)
        for seed, wanted in zip(embeddings.SEEDS, expected, strict=True):
            assert embeddings.embedding(server, seed) == close(wanted)
        assert [late.puts - early.puts for late, early in zip(lanes(server), before, strict=True)] == [2, 2]
        server.wait_for_baseline()


@pytest.mark.matrix
@FOUR
def test_a_node_with_another_version(
    release: str, plugin_wheel: Path, tmp_path: Path, transcripts: Transcripts
) -> None:
    """It is sent what the engine sends, and answers are right. One line names the versions."""
    unpatched = transcripts.of(release, plain)["answers"]
    other = changed_wheel(tmp_path, "plugin/mmlane/__init__.py", "__version__ = .*", '__version__ = "9.9"')
    env_of = {1: {"PYTHONPATH": f"{other}{os.pathsep}{PROBES}"}}
    with WatchedNodes(release, plugin=plugin_wheel, env_of=env_of) as server:
        line = f"rank 1 runs mmlane 9.9, this one {__version__}: install one on all nodes"

        def is_said() -> bool:
            assert server.generate([asking.image()], asking.TEXT).status == 200
            return line in server.log()

        asking.wait_for(is_said, "the line")
        for name, ask in asking.ANSWERED.items():
            assert answer(ask(server)) == unpatched[name], name
        still_answers(server)
        assert server.log().count(line) == 1 and CROSSING not in server.log()
        assert server.lane(0).tickets == 0


class Crossed:
    """What arrived at the second node, and what the tokenizer copied into its lane at the same time, in bytes."""

    arrived = payload = 0


def crossing(server: WatchedNodes, ask: Callable[[], Reply]) -> Crossed:
    """The least of several requests, as ranks exchange other things, too."""
    found = Crossed()
    for _ in range(5):
        put, there = server.lane(0).copied_bytes, server.network.received(1)
        assert ask().status == 200
        arrived = server.network.received(1) - there
        found.payload = server.lane(0).copied_bytes - put
        found.arrived = min(found.arrived or arrived, arrived)
    return found


def large(server: WatchedNodes, samples: int = 1) -> Reply:
    return server.generate(four_images(), asking.TEXT, n=samples, max_new_tokens=1)
