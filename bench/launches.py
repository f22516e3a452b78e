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

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.engine.cases import Case
from bench.engine.measuring import ask, order, per_request, read_notes
from bench.engine.probe import sitecustomize as probe
from bench.machine import facts, processor
from bench.releases import NEWEST
from devkit.client import IMAGE_SLOT, data_url
from devkit.demo import build_wheel
from devkit.environment import engine_environment
from devkit.images import jpeg
from devkit.server import EngineServer, free_port

IMAGES = 5
INLINE = 32
IMAGE_TOKENS, WORD = [265, 268, 266], list(b"What is this?")  # of the devkit's checkpoints
MODES = ("off", "lane")
INLINE_RELEASES = ("0.5.12.post1", NEWEST)


@dataclass(frozen=True)
class Launch:
    """What is launched. by_tokens: prompts are tokens, as an engine without a tokenizer wants them."""

    release: str
    flag: str
    by_tokens: bool = False

    def arguments(self) -> list[str]:
        address = [] if self.by_tokens else [f"127.0.0.1:{free_port()}"]
        return [self.flag, *address]

    def __str__(self) -> str:
        return f"{self.release} {self.flag}"


LAUNCHES = (Launch(NEWEST, "--skip-tokenizer-init", by_tokens=True), Launch("0.5.12.post1", "--dist-init-addr"))


@dataclass
class Figures:
    """Of each request: seconds, and storage over payload."""

    blocked: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


def measure(launch: Launch, mode: str, wheel: Path, count: int, into: Figures) -> None:
    """One server, and as many requests to it; those before its lane is open do not count."""
    pictures = [data_url(jpeg(1280, 720, seed)) for seed in range(IMAGES)]
    case = Case("image", IMAGES)
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as notes:
        env = {"PYTHONPATH": str(Path(probe.__file__).parent), probe.DIRECTORY: notes}
        plugin = None if mode == "off" else wheel
        with EngineServer(launch.release, plugin=plugin, args=launch.arguments(), env=env) as server:
            bodies = [_body(launch, pictures, number) for number in range(count + 3)]
            ask(server, bodies[:3], case)
            answered = ask(server, bodies[3:], case)
        written = read_notes(Path(notes))
    figures = per_request(written, answered, 1)
    into.blocked += figures["send_s"]
    into.received += map(max, figures["recv0_s"], figures["recv1_s"])
    into.latency += [each.ended - each.began for each in answered]
    into.held += [note["held"] / note["bytes"] for note in written if note["what"] == "recv"][-2 * count :]


def _body(launch: Launch, pictures: Sequence[str], number: int) -> dict[str, Any]:
    word = [*WORD, number % 200]
    if launch.by_tokens:
        prompt: dict[str, Any] = {"input_ids": IMAGE_TOKENS * IMAGES + word}
    else:
        prompt = {"text": IMAGE_SLOT * IMAGES + f"What is this? ({number})"}
    return {
        **prompt,
        "image_data": list(pictures),
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }


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
    parser = argparse.ArgumentParser(
        prog="python -m bench.launches", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--requests", type=int, default=8, help="that count, on each server (8)")
    parser.add_argument("--rounds", type=int, default=2, help="servers for each launch and mode (2)")
    options = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as scratch:
        wheel = build_wheel(Path(scratch))
        found = {(launch, mode): Figures() for launch in LAUNCHES for mode in MODES}
        for launch in LAUNCHES:
            for _, mode in order(MODES, options.rounds):
                measure(launch, mode, wheel, options.requests, found[launch, mode])
        inline = {release: _inline(release, wheel) for release in INLINE_RELEASES}
    console.print(f"{facts()['cores']} cores ({processor()}), mmlane {facts()['commit']}")
    table = Table("launch", "mode", "blocked, ms", "received, ms", "held / payload", "latency, ms", box=None)
    for (launch, mode), figures in found.items():
        off = found[launch, "off"]
        cells = []
        for name in ("blocked", "received", "held", "latency"):
            value = statistics.median(getattr(figures, name))
            ratio = value / statistics.median(getattr(off, name))
            shown = f"{value:.2f}" if name == "held" else f"{value * 1e3:.0f}"
            cells.append(shown if mode == "off" else f"{shown} ({ratio:.2f} x)")
        table.add_row(str(launch), mode, *cells)
    console.print(table)
    for release, of in inline.items():
        console.print(
            f"{release}: {INLINE} images inline: {of['off']:.2f} x their bytes, {of['inline_views']:.2f} x"
        )


def _inline(release: str, wheel: Path) -> dict[str, float]:
    python = engine_environment(release, plugin=wheel).python
    code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
    code += "from bench import launches; print(json.dumps(launches.pickled()))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
