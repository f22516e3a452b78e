"""Each release, without the plugin and with it: the fault shows, then it is gone, and nothing else has changed."""

from __future__ import annotations

import concurrent.futures
import re
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.images import jpeg
from mmlane import compat
from mmlane.engine import Engine
from mmlane.settings import Settings
from tests.engine import scenarios
from tests.engine.conftest import FANNED_OUT, ISOLATED, Transcript
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine


# --- without the plugin: the faults ---


def test_unpatched_answers_the_plain_requests(unpatched: Transcript) -> None:
    assert {name: reply.status for name, reply in unpatched.answers.items()} == dict.fromkeys(
        scenarios.ANSWERED, 200
    )


def test_unpatched_one_image_with_n_3(version: str, unpatched: Transcript) -> None:
    assert unpatched.one_image_n3 is not None
    assert unpatched.survived_n3 == (Version(version) >= FANNED_OUT)
    assert (unpatched.one_image_n3.status == 200) == unpatched.survived_n3


def test_unpatched_several_images_with_n_2(unpatched: Transcript) -> None:
    assert unpatched.several_images is not None
    assert unpatched.several_images.status == 400
    assert "image_data" in str(unpatched.several_images.body)


def test_unpatched_lost_segment(version: str, unpatched: Transcript) -> None:
    assert unpatched.lost_segment is not None
    assert unpatched.lost_segment.status != 200
    assert unpatched.survived_lost_segment == (Version(version) >= ISOLATED)


# --- with the plugin ---


def test_the_report_agrees_with_the_table(version: str, patched: WatchedServer) -> None:
    specs, problems = compat.contributed()
    decisions = compat.plan(specs, Engine(Version(version), None), Settings(mode="backport"))
    block = [line.partition("mmlane: ")[2] for line in patched.log().splitlines() if line.startswith("mmlane: ")]
    (applied,) = [line for line in block if line.startswith("  applied:")]
    (native,) = [line for line in block if line.startswith("  native:")]
    assert applied == "  applied: " + ", ".join(i for i, d in decisions.items() if d.state == "planned")
    assert native == "  native:  " + (", ".join(i for i, d in decisions.items() if d.state == "native") or "none")
    assert not any("skipped" in line for line in block if not re.match(r"\[\d+\]", line)), block
    assert problems == ()


def test_every_process_reports(version: str, patched: WatchedServer) -> None:
    lines = re.findall(r"mmlane: \[(\d+)\] (\w+): sglang (\S+), .*?; skipped (\w+)", patched.log())
    roles = sorted(role for _, role, _, _ in lines)
    assert roles == ["detokenizer", "main", "scheduler", "scheduler"]
    assert {(found, skipped) for _, _, found, skipped in lines} == {(version, "arena")}  # not of this mode
    pids = {int(pid) for pid, *_ in lines}
    assert pids <= {process.pid for process in patched.processes()}


@pytest.mark.parametrize("name", scenarios.ANSWERED)
def test_the_tokens_are_those_of_the_unpatched_engine(
    name: str, unpatched: Transcript, patched: WatchedServer
) -> None:
    reply = scenarios.ANSWERED[name](patched)
    assert reply.status == 200, reply.body
    assert scenarios.tokens(reply) == scenarios.tokens(unpatched.answers[name])


def test_one_image_with_n_3(version: str, unpatched: Transcript, patched: WatchedServer) -> None:
    reply = scenarios.one_image_n3(patched)
    assert reply.status == 200, reply.body
    one = scenarios.tokens(patched.generate([scenarios.image(4)], scenarios.TEXT))
    assert scenarios.tokens(reply) == one * 3
    if Version(version) >= FANNED_OUT:
        assert unpatched.one_image_n3 is not None
        assert scenarios.tokens(reply) == scenarios.tokens(unpatched.one_image_n3)


def test_several_images_with_n_2(patched: WatchedServer) -> None:
    reply = scenarios.two_images_n2(patched)
    assert reply.status == 200, reply.body
    once = patched.chat([scenarios.image(5), scenarios.image(6)], scenarios.TEXT)
    assert reply.texts == once.texts * 2
    # Both images count: without the second, or with a larger one, the prompt has another length.
    lengths = [
        patched.chat(images, scenarios.TEXT, n=2).body["usage"]["prompt_tokens"]
        for images in ([scenarios.image(5)], [scenarios.image(5), jpeg(640, 480, seed=6)])
    ]
    assert lengths[0] < once.body["usage"]["prompt_tokens"] < lengths[1]


def test_a_lost_segment_fails_its_own_request(patched: WatchedServer) -> None:
    reply = scenarios.ask_and_lose_the_segment(patched)
    assert reply.status == 500, reply.body
    assert "segment" in str(reply.body) or "shared-memory" in str(reply.body)
    assert patched.generate([scenarios.image(7)], scenarios.TEXT).status == 200


def test_a_lost_segment_fails_a_streamed_request_too(patched: WatchedServer) -> None:
    patched.loses()
    with scenarios.schedulers_stopped(patched):
        before = scenarios.segments(patched)
        events = scenarios.in_background(lambda: list(patched.stream([scenarios.image(8)], scenarios.TEXT)))
        scenarios.wait_for(lambda: bool(set(scenarios.segments(patched)) - set(before)), "the segment")
        for name in set(scenarios.segments(patched)) - set(before):
            Path("/proc", str(patched.pid), "root/dev/shm", name).unlink()
    try:
        last = events.result(scenarios.WAIT_S)[-1]
    except RuntimeError as error:  # a status instead of a stream
        assert str(error).startswith("500")
    else:
        assert "500" in str(last)
    assert scenarios.ANSWERED["text only"](patched).status == 200


def test_streaming(unpatched: Transcript, patched: WatchedServer) -> None:
    events = list(patched.stream([scenarios.image()], scenarios.TEXT))
    assert len(events) > 1
    assert events[-1]["text"] == unpatched.answers["one image"].texts[0]


def test_concurrent_requests_of_every_kind(unpatched: Transcript, patched: WatchedServer) -> None:
    names = [*scenarios.ANSWERED] * 2
    with concurrent.futures.ThreadPoolExecutor(len(names) + 2) as pool:
        plain = [pool.submit(scenarios.ANSWERED[name], patched) for name in names]
        fanned = [pool.submit(scenarios.one_image_n3, patched), pool.submit(scenarios.two_images_n2, patched)]
        for name, future in zip(names, plain, strict=True):
            assert scenarios.tokens(future.result()) == scenarios.tokens(unpatched.answers[name])
        assert [future.result().status for future in fanned] == [200, 200]


def test_hanging_up_in_mid_flight(patched: WatchedServer) -> None:
    """A user who goes away: at the first token, and while the request still waits for the schedulers."""
    events = patched.stream([scenarios.image(9)], scenarios.TEXT, max_new_tokens=200)
    next(events)
    events.close()  # type: ignore[attr-defined]
    with scenarios.schedulers_stopped(patched):
        before = scenarios.segments(patched)
        request = scenarios.in_background(
            lambda: patched.generate([scenarios.image(9)], scenarios.TEXT, max_new_tokens=2000)
        )
        scenarios.wait_for(lambda: bool(set(scenarios.segments(patched)) - set(before)), "the segment")
        assert patched.client.post("/abort_request", {"abort_all": True}).status == 200
    reply = request.result(scenarios.WAIT_S)
    assert "abort" in str(reply.body).lower(), reply
    assert patched.generate([scenarios.image()], scenarios.TEXT).status == 200


def test_tensors_do_not_cross_the_loopback(version: str, unpatched: Transcript, patched: WatchedServer) -> None:
    """0.5.9 pickles whole tensors to the other rank; with the plugin only pointers go, as on later releases."""
    tensor = 640 * 480 * 3 * 4 // 2  # bytes; a lower bound for the float32 patches of a 640x480 image
    before = scenarios.loopback_bytes()
    scenarios.ANSWERED["larger image"](patched)
    assert scenarios.loopback_bytes() - before < tensor
    assert (unpatched.image_bytes > tensor) == (Version(version) < Version("0.5.10"))


def test_nothing_is_left_in_shared_memory(patched: WatchedServer) -> None:
    """After everything above, while the engine still runs and when it has ended."""

    def features() -> list[str]:
        # Not every segment: the engine keeps queues between its processes there, named psm_ on older releases.
        return [name for name in patched.shm_listing() if name.startswith(("mmlane_", "sgl_shm_mm"))]

    scenarios.wait_for(lambda: features() == [], lambda: f"{features()} to go")
    patched.stop()
    assert features() == []
    assert patched.processes() == []
