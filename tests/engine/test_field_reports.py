"""What users of SGLang have reported, asked of one server: odd images, and many of them.

Reports that other tests have on every release: users who hang up on several samples are in test_release_lane.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from devkit.client import IMAGE_SLOT, Reply, data_url
from devkit.images import jpeg
from tests.engine import asking, server_lanes
from tests.engine.asking import image
from tests.engine.conftest import end_the_one_before
from tests.engine.faults import DEFERRED
from tests.engine.field_reports import by_segment, cached_tokens, flush, lane_off, nothing_left, on
from tests.engine.watching import WatchedServer

pytestmark = [pytest.mark.engine, on("0.5.18")]

BATCH = 64
# From here on an image that cannot be read is a fault of the request's; before, the engine takes it for its own.
REFUSES = Version("0.5.17")
HEADS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01"}


@pytest.fixture(scope="module")
def engine(version: str, plugin_wheel: Path) -> Iterator[WatchedServer]:
    end_the_one_before()
    with WatchedServer(version, plugin=plugin_wheel) as server:
        server_lanes.open_lanes(server)
        yield server


def test_many_small_images_in_one_request(version: str, engine: WatchedServer) -> None:
    ask = partial(engine.chat, [image(seed) for seed in range(24)], asking.TEXT)
    expected = by_segment(engine, ask)
    with all_by_lane(engine, version, 24):
        reply = ask()
    assert reply.texts == expected.texts
    assert reply.body["usage"]["prompt_tokens"] > 24 * tokens(*asking.IMAGE)
    nothing_left(engine)


@on("0.5.18", since="0.5.10")  # 0.5.9 attends to all of them at once, which takes 12 GB of each rank
def test_several_large_images_in_one_request(version: str, engine: WatchedServer) -> None:
    """Five of 22 MiB each; that they arrive as they were sent, the server verifies at its end."""
    size = (1280, 720)
    with all_by_lane(engine, version, 5):
        reply = engine.chat([jpeg(*size, seed=seed) for seed in range(5)], asking.TEXT)
    assert reply.status == 200, reply.body
    assert reply.body["usage"]["prompt_tokens"] > 5 * tokens(*size)
    nothing_left(engine)


@contextmanager
def all_by_lane(server: WatchedServer, release: str, images: int) -> Iterator[None]:
    """One request with so many images is asked inside, and nothing of it goes another way."""
    before = server_lanes.lane(server)
    yield
    after = server_lanes.lane(server)
    # 0.5.9 sends the images of a request as one feature. The positions of a long prompt go by lane as well.
    features = images if Version(release) >= DEFERRED else 1
    assert after.puts - before.puts in (features, features + 1)
    assert after.fallbacks == before.fallbacks


def tokens(width: int, height: int) -> int:
    """How many an image takes."""
    return round(width / 28) * round(height / 28)


@pytest.mark.parametrize("kind", HEADS)
def test_a_corrupted_image(kind: str, version: str, unpatched: Any, engine: WatchedServer) -> None:
    """It fails its own request as it does without mmlane, a batch of prompts as a whole, and no other request."""
    corrupted = HEADS[kind] + random.Random(kind).randbytes(6 << 20)
    right = unpatched["pictures"]["4"]["tokens"]
    others = [asking.in_background(partial(engine.generate, [image(4)], asking.TEXT)) for _ in range(4)]
    refused = [
        engine.generate([corrupted], asking.TEXT),
        engine.chat([corrupted], asking.TEXT),
        engine.generate([image(4), corrupted], asking.TEXT),
        batch(engine, [image(4), corrupted, image(8)]),
    ]
    status = 400 if Version(version) >= REFUSES else 500
    assert [reply.status for reply in refused] == [status] * len(refused), refused
    assert [asking.tokens(other.result(asking.WAIT_S)) for other in others] == [right] * len(others)
    nothing_left(engine)  # neither of the prompt that the batch had sent before it failed
    assert asking.tokens(engine.generate([image(4)], asking.TEXT)) == right


def batch(server: WatchedServer, pictures: list[bytes]) -> Reply:
    """One native request with a prompt for each picture."""
    request = {
        "text": [IMAGE_SLOT + asking.TEXT] * len(pictures),
        "image_data": [data_url(picture) for picture in pictures],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
    }
    return server.client.post("/generate", request)


def test_a_large_batch(engine: WatchedServer) -> None:
    """64 prompts in one request, an image each, all of them under way at once."""
    pictures = [image(seed) for seed in range(BATCH)]
    nothing_left(engine)
    with asking.schedulers_stopped(engine):  # else the engine's own race, see request_kinds.py
        answer = asking.in_background(partial(batch, engine, pictures))
        asking.wait_for(
            lambda: server_lanes.lane(engine).tickets == BATCH, lambda: f"tickets: {server_lanes.lane(engine)}"
        )
    reply = answer.result(asking.WAIT_S)
    assert reply.status == 200, reply.body
    found = asking.tokens(reply)
    assert len(found) == BATCH
    for seed in range(0, BATCH, 8):
        assert asking.tokens(engine.generate([pictures[seed]], asking.TEXT)) == [found[seed]], seed
    nothing_left(engine)


def test_a_conversation_that_resends_its_images(version: str, engine: WatchedServer) -> None:
    """Each turn has the images of all turns before, which the engine finds in its caches: no ticket stays."""
    with lane_off(engine):
        expected = conversation(engine)
    flush(engine)
    before = server_lanes.lane(engine), len(engine.log())
    assert conversation(engine) == expected
    assert len(set(expected)) == len(expected)
    if Version(version) >= DEFERRED:  # 0.5.9 knows the images of a request only together
        assert cached_tokens(engine.log()[before[1] :]) > tokens(*asking.IMAGE)
    assert server_lanes.lane(engine).puts > before[0].puts
    assert server_lanes.lane(engine).fallbacks == before[0].fallbacks


def conversation(server: WatchedServer) -> list[str]:
    """What is answered to each of three turns, with an image each."""
    messages: list[dict[str, Any]] = []
    said = []
    for seed in range(3):
        picture = {"type": "image_url", "image_url": {"url": data_url(image(seed))}}
        messages.append({"role": "user", "content": [picture, {"type": "text", "text": asking.TEXT}]})
        request = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 8}
        reply = server.client.post("/v1/chat/completions", request)
        assert reply.status == 200, reply.body
        said.append(reply.body["choices"][0]["message"]["content"])
        messages.append({"role": "assistant", "content": said[-1]})
        nothing_left(server)
    return said
