"""What is asked of the engine: images that no request before had, over HTTP."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from bench.engine.asking import Unanswered
from devkit.client import Client

QUESTION = "What is this?"
_BLOCKS = 16  # coloured squares on each side of an image
_MOST_TOKENS = 2


@dataclass(frozen=True)
class Case:
    """One kind of request, so many of them together."""

    images: int
    width: int
    height: int
    n: int = 1
    together: int = 1

    def __str__(self) -> str:
        what = f"{self.images} image{'s' * (self.images > 1)} {self.width}x{self.height}"
        if self.n > 1:
            what += f", n = {self.n}"
        return f"{self.together} requests of {what}, all at once" if self.together > 1 else what


CASES = (
    Case(1, 640, 480),
    Case(4, 1280, 720),
    Case(8, 1280, 720),
    Case(1, 1280, 720, n=8),
    Case(4, 1280, 720, together=8),
)


class Images:
    """JPEG images, each another one; the same ones in the same order from the start."""

    def __init__(self) -> None:
        self._seeds = count()

    def next(self, width: int, height: int) -> bytes:
        from PIL import Image  # the engine has it

        colours = random.Random(next(self._seeds)).randbytes(3 * _BLOCKS * _BLOCKS)
        file = io.BytesIO()
        Image.frombytes("RGB", (_BLOCKS, _BLOCKS), colours).resize((width, height)).save(file, "JPEG")
        return file.getvalue()


def rounds(client: Client, case: Case, images: Images, number: int) -> Iterator[tuple[float, list[str]]]:
    """For each round the seconds until all of it was answered, and the texts. Raises Unanswered."""
    with ThreadPoolExecutor(case.together) as threads:
        for _ in range(number):
            requests = [
                [images.next(case.width, case.height) for _ in range(case.images)] for _ in range(case.together)
            ]
            began = time.perf_counter()
            answers = list(threads.map(lambda pictures: ask(client, case, pictures), requests))
            yield time.perf_counter() - began, [text for texts in answers for text in texts]


def ask(client: Client, case: Case, pictures: Sequence[bytes]) -> tuple[str, ...]:
    """The texts of one request's answer. Raises Unanswered."""
    reply = client.chat(pictures, QUESTION, n=case.n, max_tokens=min(case.n, _MOST_TOKENS))
    if reply.status != 200 or len(reply.texts) != case.n:
        raise Unanswered(f"{case}: wanted {case.n} texts, found status {reply.status}: {reply.body}")
    return reply.texts
