"""`mmlane bench`: what handing a feature to its readers costs on this machine, with its engine."""

from __future__ import annotations

import importlib.util
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mmlane import PREFIX, engine
from mmlane.bench.case import Case
from mmlane.bench.comparing import Comparing, Plan
from mmlane.bench.installed_torch import NoTorch, Torch, installed
from mmlane.bench.need import Need, lacking, need
from mmlane.bench.results import Results
from mmlane.bench.sizes import KIB, MIB, parse_size, size
from mmlane.bench.ways import on_cpu, on_device
from mmlane.cli import units
from mmlane.cli.bench_report import Progress, as_json, draw, render
from mmlane.cli.checks import FINE, NO_ENGINE, TROUBLE, USAGE
from mmlane.cli.console import console, until_closed

SIZES = (MIB, 16 * MIB, 64 * MIB)
SAMPLES = (1, 8)
INTERRUPTED = 130
_LEAST = 128 * KIB  # with mmlane, an engine sends up to half of that inside of the request

T = TypeVar("T")


class Several(tuple[int, ...]):
    """The numbers of one option."""


class Refused(Exception):
    """The comparison is not made; `code`: what the command exits with."""

    def __init__(self, why: str, code: int = TROUBLE) -> None:
        super().__init__(why)
        self.code = code


@dataclass
class Run:
    """What is known of a run, up to where it has come. error: why it is not complete."""

    engine: str | None = None
    torch: Torch | None = None
    needs: Need | None = None
    results: Results = field(default_factory=Results)
    error: str = ""
    code: int = FINE


def _listed(one: Callable[[str], int], text: str) -> Several:
    try:
        return Several(sorted({one(word.strip()) for word in text.split(",")}))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _size(word: str) -> int:
    nbytes = parse_size(word)
    if nbytes < _LEAST:
        raise ValueError(f"{word}: wanted {size(_LEAST)} or more; smaller features travel inside of their request")
    return nbytes


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise ValueError(f"{word!r}: wanted a number from 1 on")
    return int(word)


def _sizes(text: str) -> Several:
    return _listed(_size, text)


def _counts(text: str) -> Several:
    return _listed(_count, text)


def bench(
    sizes: Annotated[
        Several | None,
        typer.Option(parser=_sizes, metavar="SIZE,...", help="Bytes of a feature (1M,16M,64M)."),
    ] = None,
    readers: Annotated[int, typer.Option(min=1, max=64, help="Reading processes, as --tp of the engine.")] = 2,
    n: Annotated[
        Several | None,
        typer.Option("--n", parser=_counts, metavar="N,...", help="Samples of a request (1,8)."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="After that, no round begins.")] = 120.0,
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the costs as a picture; needs matplotlib.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the memory is taken.")] = False,
) -> None:
    """Compare what it costs to hand a feature to its readers on this machine.

    The ways: the installed engine as it is, with mmlane's back-ports, with the lane; and a plain copy, the limit.
    Each has processes of its own, and they take turns. No server is started, and no model is needed. Where torch
    has CUDA, the way to the GPU is compared as well. The command says first how much memory it takes at most, and
    on a terminal it asks.

    With --json, an object is printed whatever happens; its key "error" says why it is not complete.

    Exit code: 0 all fine; 1 a way could not be measured, or there is too little memory; 2 a wrong option; 3 no
    torch in this environment; 130 interrupted.
    """
    run = Run()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are to end in order then, too
    try:
        _check_plot(plot)
        _run(run, sizes, readers, n or Several(SAMPLES), seconds, ask=not yes)
    except Refused as refused:
        run.error, run.code = str(refused), refused.code
    except (KeyboardInterrupt, typer.Abort):
        run.error, run.code = "interrupted", INTERRUPTED
    except Exception as error:
        if not json:
            raise
        traceback.print_exc()
        run.error, run.code = f"{type(error).__name__}: {error}", TROUBLE
    with until_closed():
        _show(run, plot, json)
    raise typer.Exit(run.code)


def _check_plot(plot: Path | None) -> None:
    """Raises Refused."""
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed: pip install matplotlib", USAGE)
    if not plot.absolute().parent.is_dir():
        raise Refused(f"--plot {plot}: there is no directory {plot.absolute().parent}", USAGE)


def _run(run: Run, sizes: Several | None, readers: int, n: Several, seconds: float, *, ask: bool) -> None:
    """Raises Refused, KeyboardInterrupt; `run` has what was found before that."""
    try:
        run.torch = installed()
    except NoTorch as error:
        raise Refused(str(error), NO_ENGINE) from None
    found = engine.installed()
    run.engine = None if found is None else str(found.version)
    notes, left_out = [], []
    if found is None:
        notes.append("no sglang in this Python: the lane alone is compared, with a plain copy")
    if run.torch.gpu is None:
        notes.append("no CUDA here: the way to a GPU is not compared")

    def planned(some: tuple[int, ...]) -> tuple[Plan, Need]:
        device = None if run.torch is None else run.torch.device
        plan = _plan(some, readers, n, engine=found is not None, device=device)
        return plan, need(plan)

    chosen = sizes or Several(SIZES)
    while (short := lacking(planned(chosen)[1])) and sizes is None and len(chosen) > 1:
        left_out.append(f"{size(chosen[-1])}: {short}")
        chosen = Several(chosen[:-1])
    plan, run.needs = planned(chosen)
    if short:
        raise Refused(f"{short}; choose smaller --sizes, --n or --readers")
    _ask_for(run.needs, seconds, left_out, ask=ask)
    with tempfile.TemporaryDirectory(prefix="mmlane-bench-") as scratch, Progress(seconds) as progress:
        comparing = Comparing(plan, seconds=seconds, scratch=Path(scratch), say=progress.say)
        run.results = comparing.results
        run.results.notes += notes
        run.results.left_out += left_out
        comparing.run()
    if run.results.has_failed():
        run.code = TROUBLE


def _plan(sizes: tuple[int, ...], readers: int, n: tuple[int, ...], *, engine: bool, device: str | None) -> Plan:
    """What is measured, in this order: from small to large, then to the device."""
    plan = [(Case(readers, nbytes, samples), on_cpu(engine=engine)) for nbytes in sizes for samples in n]
    if device is not None:
        plan += [(Case(readers, nbytes), on_device(device)) for nbytes in sizes]
    return plan


def _ask_for(wanted: Need, seconds: float, left_out: list[str], *, ask: bool) -> None:
    """Say what is taken, and on a terminal ask. Raises Refused."""
    for line in left_out:
        typer.echo(f"{PREFIX}left out: {line}", err=True)
    typer.echo(
        f"{PREFIX}the comparison takes at most {units.size(wanted.memory)} of memory,"
        f" {units.size(wanted.shm)} of it in /dev/shm, and about {seconds:g} s",
        err=True,
    )
    if ask and sys.stdin.isatty() and sys.stderr.isatty() and not typer.confirm("Go on?", default=True, err=True):
        raise Refused("not measured: the answer was no")


def _show(run: Run, plot: Path | None, json: bool) -> None:
    if plot is not None and run.results.comparisons:
        try:
            draw(run.results, plot)
            typer.echo(f"{PREFIX}{plot} is written", err=True)
        except (OSError, ValueError) as error:  # no such format
            run.error, run.code = run.error or f"--plot {plot}: {error}", run.code or TROUBLE
    if json:
        typer.echo(as_json(run.results, run.engine, run.torch, run.needs, run.error, run.code))
        return
    render(run.results, run.engine, run.torch, console())
    if run.error:
        typer.echo(f"{PREFIX}{run.error}", err=True)
