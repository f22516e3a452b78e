"""What is asked of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.engine.probe.sitecustomize import EMBEDDING
from bench.harness.sizes import MIB, size
from devkit.client import IMAGE_SLOT, data_url
from devkit.images import jpeg

WIDTH, HEIGHT = 640, 480
POPULAR = 8  # images that come again and again
SAMPLES = 8  # of one request, the engine's n
NEW_TOKENS = 4

CONCURRENCY = (1, 8, 32)
QUICK_CONCURRENCY = (1, 8)
EMBEDDINGS = (16 * MIB, 64 * MIB)
QUICK_EMBEDDINGS = (64 * MIB,)
_MOST_EMBEDDINGS = 8  # in flight: each takes its size several times over
REQUESTS = {1: 12, 8: 32, 32: 64}  # that count, by concurrency
QUICK_REQUESTS = {1: 5, 8: 16, 32: 32}

Kind = Literal["text", "image", "embedding"]


@dataclass(frozen=True, order=True)
class Case:
    """One kind of request, so many at a time. `nbytes`: of an embedding."""

    kind: Kind
    images: int = 0
    nbytes: int = 0
    n: int = 1
    concurrency: int = 1

    @property
    def workload(self) -> Case:
        """The kind of request alone."""
        return replace(self, concurrency=1)

    @property
    def request(self) -> str:
        """The kind of request in words."""
        what = {
            "text": "text",
            "image": f"{self.images} image{'s' * (self.images > 1)}",
            "embedding": f"embedding {size(self.nbytes)}",
        }[self.kind]
        return f"{what}, n = {self.n}" if self.n > 1 else what

    def __str__(self) -> str:
        return f"{self.request}, {self.concurrency} at a time"


def plan(*, quick: bool) -> list[Case]:
    """What is harmless first; samples of one request, which end some releases, last."""
    concurrency = QUICK_CONCURRENCY if quick else CONCURRENCY
    embeddings = QUICK_EMBEDDINGS if quick else EMBEDDINGS

    def at(workload: Case, most: int = CONCURRENCY[-1]) -> Iterator[Case]:
        return (replace(workload, concurrency=c) for c in concurrency if c <= most)

    cases: list[Case] = []
    for images in (0, 1, 4):
        cases += at(Case("image" if images else "text", images))
    for nbytes in embeddings:
        cases += at(Case("embedding", nbytes=nbytes), _MOST_EMBEDDINGS)
    for images in (0, 1, 4):
        cases += at(Case("image" if images else "text", images, n=SAMPLES))
    return cases


def question(images: int, number: int) -> dict[str, str]:
    """A prompt with places for so many images, of which no two numbers have the same."""
    return {"text": f"{IMAGE_SLOT * images}What is this? ({number})"}


def body(prompt: Mapping[str, Any], images: Sequence[str], **sampling: Any) -> dict[str, Any]:
    """Of a request; `prompt` has its text or its tokens."""
    asked = {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, **sampling}}
    return {**asked, "image_data": images} if images else asked


class Bodies:
    """The bodies of requests, each with a text of its own."""

    def __init__(self) -> None:
        self._images = [data_url(jpeg(WIDTH, HEIGHT, seed)) for seed in range(1, POPULAR + 1)]
        self._number = 0

    def next(self, case: Case) -> dict[str, Any]:
        self._number += 1
        slots = case.images + (case.kind == "embedding")
        images: Sequence[str] = f"{EMBEDDING}{case.nbytes}"
        if case.kind != "embedding":
            # Always those that follow one another: a list of images is one item to old releases' caches.
            images = [self._images[(self._number + i) % POPULAR] for i in range(case.images)]
        return body(question(slots, self._number), images, n=case.n)

    def all_popular(self) -> Iterator[dict[str, Any]]:
        """Requests after which the engine's caches know every list of images."""
        for images in (1, 4):
            for _ in range(POPULAR):
                yield self.next(Case("image", images))


def answers(body: Any) -> int:
    """How many samples an answer holds."""
    return len(body) if isinstance(body, Sequence) and not isinstance(body, str) else 1
