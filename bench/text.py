"""What mmlane costs a request without images: time per call, where it stands in the way of all requests.

    python -m bench.text [--releases 0.5.9 ...]

Too little to be seen from outside, where two servers of one kind differ by more (`bench.engine --only text`). So,
in the environment of each release with the plugin installed: what mmlane puts in the place of the function that
sends a request, and of the one that receives requests, is built around a function that does nothing, and timed
beside it. Requests are the engine's own, with text only. A scheduler receives once for each step of its loop, and
mostly nothing.

Figures are the differences in microseconds per call, the least of several repetitions of each.
"""

from __future__ import annotations

import inspect
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.engine.inside import call_inside
from bench.harness import command, tables
from bench.harness.ratios import Spread, put, quartiles
from bench.harness.tables import Grid
from bench.releases import NEWEST
from devkit.demo import build_wheel

RELEASES = ("0.5.9", "0.5.12.post1", "0.5.18", NEWEST)
CALLS = 10_000
REPETITIONS = 9
SEND = "TokenizerManager._send_one_request"
RECEIVE = ("Scheduler.recv_requests", "SchedulerRequestReceiver._finalize_shm_features")


def measure(release: str) -> dict[str, list[list[float]]]:
    """Called in an engine's environment: what is measured -> microseconds per call, bare and patched, repeated."""
    import sglang.srt.managers.scheduler  # noqa: F401 - mmlane looks into it
    from packaging.version import Version
    from sglang.srt import server_args
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    import mmlane_patches
    from mmlane.compat import contributed
    from mmlane.patching import shared_steps

    # As on one node: what the engine's own function asks, which 0.5.10 - 0.5.12 call for each request.
    mm_utils._is_default_tensor_transport = False
    server_args._global_server_args = SimpleNamespace(skip_tokenizer_init=False)
    version = Version(release)
    specs = [
        spec for spec in contributed(mmlane_patches)[0] if (cell := spec.cell(version)) and cell.state == "apply"
    ]
    targets = [target for spec in specs for target in spec.targets_on(version)]

    def around(nothing: Callable[..., Any], *names: str) -> Callable[..., Any]:
        done: list[Any] = []
        for target in targets:
            if target.name not in names or any(target.shares(other) for other in done):
                continue
            done.append(target)
            nothing = target.build(nothing, shared_steps(target, targets))
        return nothing

    parameters = inspect.signature(TokenizedGenerateReqInput).parameters.values()
    required = {p.name: None for p in parameters if p.default is p.empty} | {"mm_inputs": None}
    text = [TokenizedGenerateReqInput(**required) for _ in range(32)]

    def receive(self: Any, received: Any = None) -> Any:
        return self.arrived if received is None else None  # the first returns requests, the second is given them

    def send(self: Any, tokenized_obj: Any) -> None: ...

    def send_0_5_9(self: Any, obj: Any, tokenized_obj: Any, created_time: Any = None) -> None: ...

    async def send_async(self: Any, tokenized_obj: Any) -> None: ...

    def run(call: Callable[..., Any]) -> Callable[..., None]:
        def to_its_end(*args: Any) -> None:
            try:
                call(*args).send(None)
            except StopIteration:
                return

        return to_its_end

    manager = SimpleNamespace()
    found = {}
    if version >= Version("0.5.20"):
        found["sending"] = both(run(send_async), run(around(send_async, SEND)), manager, text[0])
    elif version >= Version("0.5.10"):
        found["sending"] = both(send, around(send, SEND), manager, text[0])
    else:
        found["sending"] = both(send_0_5_9, around(send_0_5_9, SEND), manager, None, text[0])
    for count, what in ((0, "receiving nothing"), (1, "receiving 1"), (32, "receiving 32")):
        receiver: Any = SimpleNamespace(
            arrived=text[:count],
            tp_size=1,
            tp_cpu_group=None,
            server_args=SimpleNamespace(enable_dp_attention=False),
        )
        given = [receiver.arrived] if version >= Version("0.5.13") else []
        found[what] = both(receive, around(receive, *RECEIVE), receiver, *given)
    return found


def both(bare: Callable[..., Any], patched: Callable[..., Any], *args: Any) -> list[list[float]]:
    """Microseconds per call of each, in several repetitions."""
    found = []
    for call in (bare, patched):
        times = timeit.repeat(lambda call=call: call(*args), number=CALLS, repeat=REPETITIONS)  # type: ignore[misc]
        found.append([time / CALLS * 1e6 for time in times])
    return found


def main() -> None:
    parser = command.parser("text", __doc__)
    parser.add_argument("--releases", nargs="+", default=RELEASES, metavar="VERSION", help=", ".join(RELEASES))
    rows = []
    ratios: dict[str, Spread | None] = {}
    with tempfile.TemporaryDirectory(prefix=command.SCRATCH) as scratch:
        wheel = build_wheel(Path(scratch))
        for release in parser.parse_args().releases:
            found = call_inside(release, wheel, "bench.text", "measure", release)
            rows.append([release, *(f"{min(patched) - min(bare):.1f}" for bare, patched in found.values())])
            for what, (bare, patched) in found.items():
                ratios[f"{release}, {what}: patched over bare"] = quartiles(patched).over(quartiles(bare))
    headings = ["release", *found]
    tables.render([Grid("added for text only, µs per call", headings, rows)], tables.console())
    print(put("text", ratios, command.OUT))


if __name__ == "__main__":
    main()
