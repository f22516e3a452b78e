"""Launches on one node in which the engine sends images inside of their requests: python -m bench.launches

Five images of 1280x720 in a request, one request at a time, on the real engine (devkit) on this machine's CPU,
TP 2: with --skip-tokenizer-init, and with --dist-init-addr, which releases up to 0.5.18 take for a sign of several
nodes. `off` is the engine without the plugin, beside it the plugin in its default mode; servers of both in turn.

blocked: in `TokenizerManager._send_one_request`, while the event loop does nothing else. received: in
`recv_requests`, of the rank for which it took longer. held: the storage that a rank keeps for a request's tensors,
over their own bytes. Figures are medians over requests; how they are noted is told in `bench.engine`.

And inline, by hand: what a request of 32 images pickles to, over the bytes of its pixels, with the engine's own
function that splits them, and with the plugin's way of sending what is left inside of a request.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine.asking import ask, probed
from bench.engine.cases import Case, body, question
from bench.engine.inside import call_inside
from bench.engine.modes import BLOCKED, HELD, LATENCY, RECEIVED, compare, of_requests, parser, rows
from bench.harness import command, machine, tables
from bench.harness.results import Results
from bench.harness.tables import Grid
from bench.releases import NEWEST
from devkit.client import data_url
from devkit.demo import build_wheel
from devkit.images import jpeg
from devkit.server import EngineServer, free_port

IMAGES = 5
INLINE = 32
IMAGE_TOKENS, WORD = [265, 268, 266], list(b"What is this?")  # of the devkit's checkpoints
INLINE_RELEASES = ("0.5.12.post1", NEWEST)
MEASURES = (BLOCKED, RECEIVED, HELD, LATENCY)
UNCOUNTED = 3  # requests to each server before those that count: its lane is not open yet


@dataclass(frozen=True)
class Launch:
    """What is launched. by_tokens: prompts are tokens, as an engine without a tokenizer wants them."""

    release: str
    flag: str
    by_tokens: bool = False

    def arguments(self) -> list[str]:
        address = [] if self.by_tokens else [f"127.0.0.1:{free_port()}"]
        return [self.flag, *address]

    def prompt(self, number: int) -> dict[str, Any]:
        tokens = [*IMAGE_TOKENS * IMAGES, *WORD, number % 200]
        return {"input_ids": tokens} if self.by_tokens else question(IMAGES, number)

    def __str__(self) -> str:
        return f"{self.release} {self.flag}"


LAUNCHES = (Launch(NEWEST, "--skip-tokenizer-init", by_tokens=True), Launch("0.5.12.post1", "--dist-init-addr"))


def measure(launch: Launch, plugin: Path | None, count: int) -> dict[str, list[float]]:
    """One server, and so many requests to it that count."""
    pictures = [data_url(jpeg(1280, 720, seed)) for seed in range(IMAGES)]
    prompts = [launch.prompt(number) for number in range(UNCOUNTED + count)]
    bodies = [body(prompt, pictures, ignore_eos=True) for prompt in prompts]
    case = Case("image", IMAGES)
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
        notes = Path(scratch)
        with EngineServer(launch.release, plugin=plugin, args=launch.arguments(), env=probed(notes)) as server:
            ask(server, bodies[:UNCOUNTED], case)
            answered = ask(server, bodies[UNCOUNTED:], case)
        return of_requests(notes, answered, server.tp)


def pickled() -> dict[str, float]:
    """Called in an engine's environment: pickled bytes of a request of many images over those of its pixels."""
    import pickle

    import torch
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

    from mmlane.transport.compacting import compact_all

    class Request:
        mm_inputs: Any = None

    patches = 256
    item = MultimodalDataItem(modality=Modality.IMAGE, feature=torch.rand(INLINE * patches, 1176))
    item.model_specific_data["image_grid_thw"] = torch.tensor([[1, 16, 16]] * INLINE)
    item.offsets = [(n, n) for n in range(INLINE)]
    payload = item.feature.nbytes
    items = get_new_expanded_mm_items([item])
    assert len(items) == INLINE
    request = Request()
    request.mm_inputs = MultimodalProcessorOutput(mm_items=items)
    before = len(pickle.dumps(request.mm_inputs))
    compact_all([request])
    return {"off": before / payload, "inline_views": len(pickle.dumps(request.mm_inputs)) / payload}


def main() -> None:
    options = parser("launches", __doc__).parse_args()
    console = tables.console()
    results: Results[Launch] = Results()
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
        wheel = build_wheel(Path(scratch))
        for launch in LAUNCHES:
            compare(results, launch, wheel, options, measure)
        inline = {release: call_inside(release, wheel, "bench.launches", "pickled") for release in INLINE_RELEASES}
    console.print(machine.in_short())
    found = [row for launch in LAUNCHES for row in rows(results, launch, MEASURES)]
    tables.render([Grid("Launches", ["launch", "mode", *map(str, MEASURES)], found, 2)], console)
    for release, of in inline.items():
        console.print(
            f"{release}: {INLINE} images inline: {of['off']:.2f} x their bytes, {of['inline_views']:.2f} x"
        )


if __name__ == "__main__":
    main()
