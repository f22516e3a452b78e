"""`make demo`: the real engine with the plugin and without it, the same image requests to both, side by side.

Before what is shown, one image warms each engine up; with the plugin it also opens the lane.

Builds what it needs, ends every server that it starts, and exits with 0 if the engine with the plugin answered
everything.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from devkit.checkpoint import tiny_qwen2_vl
from devkit.client import Reply
from devkit.environment import base_environment, engine_environment
from devkit.images import jpeg
from devkit.installer import InstallError
from devkit.server import EngineServer, ServerDied
from devkit.sharedmemory import can_be_private
from mmlane.cli.units import size
from mmlane.compat import matrix
from mmlane.host import PREFIXES, SHM
from mmlane.lane.status import LaneStats, StatusError, ask, running

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_ENGINE = "0.5.12.post1"
WIDTH, HEIGHT = 640, 480
PROMPT = "What is in the picture?"
TIMES = 5  # each request is made, while it is answered
SETTLE_S = 5.0
DEATH_S = 30.0  # how long an engine may take to go down after it broke a connection


@dataclass(frozen=True)
class Case:
    """One chat request: so many JPEG images, so many samples."""

    name: str
    images: int
    n: int


CASES = (
    Case("one image", 1, 1),
    Case("one image, n = 3", 1, 3),
    Case("two images", 2, 1),
    Case("two images, n = 2", 2, 2),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one request, made several times, and whether the server died of it; seconds: the median."""

    case: Case
    reply: Reply
    died: bool
    seconds: float

    @property
    def answered(self) -> bool:
        return self.reply.status == 200 and len(self.reply.texts) == self.case.n


@dataclass
class Run:
    """All requests to an engine with or without the plugin, and what it said and left behind."""

    outcomes: list[Outcome] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    lane: LaneStats | None = None

    @property
    def deaths(self) -> int:
        return sum(outcome.died for outcome in self.outcomes)

    @property
    def answered(self) -> int:
        return sum(outcome.answered for outcome in self.outcomes)


class Demo:
    """The demo on one engine version; prints as it goes."""

    def __init__(self, version: str, console: Console) -> None:
        self.version = version
        self.console = console
        self.began = time.monotonic()

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            self._say("building the plugin's wheel from this checkout")
            wheel = build_wheel(Path(scratch))
            self._say(f"preparing sglang {self.version} (about four minutes the first time, then cached)")
            base_environment()
            engine_environment(self.version, plugin=wheel)
            tiny_qwen2_vl()
            self.images = [jpeg(WIDTH, HEIGHT, seed) for seed in range(1, max(case.images for case in CASES) + 1)]
            with_plugin = self._serve(wheel)
            without = self._serve(None)
        self._show(with_plugin, without)
        return 0 if with_plugin.answered == len(CASES) else 1

    def _serve(self, plugin: Path | None) -> Run:
        """Send every request, to a new server where the one before has died."""
        words = "with mmlane" if plugin else "without mmlane"
        run = Run()
        waiting = list(CASES)
        while waiting:
            again = " again" if run.outcomes else ""
            self._say(f"starting sglang {self.version}, TP 2, {words}{again}")
            server = EngineServer(self.version, plugin=plugin)
            with server:
                own = server.shm_listing()  # the engine's message queues, which carry no features
                server.chat(self.images[:1], PROMPT)
                while waiting:
                    outcome = self._ask(server, waiting.pop(0))
                    run.outcomes.append(outcome)
                    if outcome.died:
                        break
                run.lane = lane_of(server) if plugin else None
            run.said = run.said or [line for line in server.log().splitlines() if line.startswith("mmlane: ")]
            listing = server.shm_listing()
            if not can_be_private():
                listing = remove_unused(listing)
            run.left.update({name: held for name, held in segments_in(listing).items() if name not in own})
        return run

    def _ask(self, server: EngineServer, case: Case) -> Outcome:
        times = []
        for _ in range(TIMES):
            began = time.perf_counter()
            try:
                reply = server.chat(self.images[: case.images], PROMPT, n=case.n)
            except TimeoutError as late:
                reply = Reply(0, {"error": f"{late}"})
            times.append(time.perf_counter() - began)
            if reply.status != 200:
                break
        died = not server.alive() or (reply.status == 0 and ends_within(server, DEATH_S))
        outcome = Outcome(case, reply, died, statistics.median(times))
        self._say(f"  {case.name}: {status(outcome)}")
        return outcome

    def _say(self, words: str) -> None:
        self.console.print(
            Text(f"[{time.monotonic() - self.began:4.0f} s] ", style="dim").append(words, "not dim")
        )

    def _show(self, with_plugin: Run, without: Run) -> None:
        out = self.console
        out.print()
        out.print(Text("What mmlane said when the engine started", style="bold"))
        for line in with_plugin.said:
            out.print(Text(line), soft_wrap=True)
        out.print()
        table = Table(title=f"sglang {self.version}, TP 2, JPEG images of {WIDTH}x{HEIGHT}", title_justify="left")
        table.add_column("request")
        table.add_column("with mmlane", ratio=1)
        table.add_column("without", ratio=1)
        for on, off in zip(with_plugin.outcomes, without.outcomes, strict=True):
            table.add_row(on.case.name, cell(on), cell(off))
        table.add_row("features", features(with_plugin), "not counted")
        table.add_row("features left in /dev/shm", leftovers(with_plugin), leftovers(without))
        out.print(table)
        out.print(
            Text(
                f"Times: the median of {TIMES}. The model is tiny and its weights random: the letters only show"
                " that it ran, and most of the time does not go into features; `make bench` looks at that alone.",
                style="dim",
            )
        )
        out.print()
        out.print(f"with mmlane:    {with_plugin.answered} of {len(CASES)} requests answered")
        out.print(f"without mmlane: {without.answered} of {len(CASES)} requests answered")
        if without.deaths:
            times = "once" if without.deaths == 1 else f"{without.deaths} times"
            out.print(f"                the server died {times}, and was started again for what came after")
        both = [
            on.reply.texts == off.reply.texts
            for on, off in zip(with_plugin.outcomes, without.outcomes, strict=True)
            if on.answered and off.answered
        ]
        if both:
            out.print(f"where both answered, the texts are {'the same' if all(both) else 'NOT the same'}")
        self._say("done; every server has ended")


def build_wheel(directory: Path) -> Path:
    """A wheel of this checkout, as a user's pip builds it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(directory), str(CHECKOUT)], check=True)
    (wheel,) = directory.glob("sglang_mmlane-*.whl")
    return wheel


def ends_within(server: EngineServer, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while server.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not server.alive()


def segments_in(listing: dict[str, int]) -> dict[str, int]:
    """Of the names in a /dev/shm, those of shared-memory segments."""
    prefixes = tuple(prefix for prefix, _ in PREFIXES)
    return {name: held for name, held in listing.items() if name.startswith(prefixes)}


def remove_unused(listing: dict[str, int]) -> dict[str, int]:
    """Delete what a dead server left in the machine's /dev/shm, and return that.

    The names do not tell whose they are: what belongs to another user, is mapped, or vanishes unaided within a
    few seconds, as segments of a living engine do, is not touched.
    """
    candidates = segments_in(listing) | {
        name: held for name, held in listing.items() if name.startswith("sem.mp-")
    }
    if candidates:
        time.sleep(SETTLE_S)
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped |= {Path(line.split()[5]).name for line in maps.read_text().splitlines() if f" {SHM}/" in line}
        except (PermissionError, FileNotFoundError, ProcessLookupError):  # not ours, or gone since
            continue
    removed = {}
    for name in candidates.keys() - mapped:
        file = SHM / name
        if file.exists() and file.stat().st_uid == os.getuid():
            file.unlink(missing_ok=True)
            removed[name] = candidates[name]
    return removed


def status(outcome: Outcome) -> str:
    """One outcome in a few words."""
    if outcome.answered:
        plural = "answer" if outcome.case.n == 1 else "answers"
        return f"200, {outcome.case.n} {plural}, {outcome.seconds * 1e3:.0f} ms"
    if outcome.died:
        return "no answer: the server died"
    return f"{outcome.reply.status or 'no answer'}"


def cell(outcome: Outcome) -> Text:
    text = Text(status(outcome), style="green" if outcome.answered else "bold red")
    if outcome.answered:
        return text.append("\n" + " | ".join(outcome.reply.texts), style="default not bold")
    if not outcome.died:
        text.append("\n" + complaint(outcome.reply), style="default not bold")
    return text


def complaint(reply: Reply) -> str:
    """What the engine said instead of an answer, cut to a line or two."""
    body = reply.body
    if isinstance(body, dict):
        error = body.get("error", body)
        body = body.get("message") or (error.get("message") if isinstance(error, dict) else error) or body
    text = " ".join(str(body).split())
    return text if len(text) <= 120 else f"{text[:119]}…"


def lane_of(server: EngineServer) -> LaneStats | None:
    """The lane of a server's one tokenizer, if it has one."""
    for name in running():
        with suppress(StatusError):  # a lane of another program, which does not answer
            stats = ask(name)
            if stats.pid == server.pid:
                return stats
    return None


def features(run: Run) -> str:
    """How they travelled."""
    lane = run.lane
    if lane is None:
        return "no lane: see what mmlane said"
    copies = lane.puts - lane.shared
    rest = sum(lane.fallbacks.values())
    return (
        f"{lane.puts} by lane with {copies} copies: {size(lane.copied_bytes)} in {lane.copy_seconds * 1e3:.1f} ms;"
        f" {rest} by segment, while the lane opened"
    )


def leftovers(run: Run) -> str:
    plural = "segment" if len(run.left) == 1 else "segments"
    return f"{len(run.left)} {plural}, {size(sum(run.left.values()))}" if run.left else "nothing"


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devkit.demo", description=__doc__)
    parser.add_argument(
        "--engine",
        choices=[str(version) for version in matrix().engines],
        default=DEFAULT_ENGINE,
        metavar="VERSION",
        help="default: %(default)s",
    )
    options = parser.parse_args(argv)
    # Like Ctrl-C: the servers are in sessions of their own and have to be ended by us.
    signal.signal(signal.SIGTERM, _end)
    console = Console(highlight=False)
    try:
        return Demo(options.engine, console).run()
    except (ServerDied, InstallError) as error:
        console.print(Text(str(error)), soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
