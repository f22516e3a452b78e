"""`mmlane doctor`: what an engine started now would get, and whether this machine is fit for it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

import typer
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from mmlane import PREFIX, __version__
from mmlane.cli import lane_size
from mmlane.cli.checks import TROUBLE, USAGE, Checks, Machine, run_checks
from mmlane.cli.console import console, until_closed
from mmlane.cli.triggers import Triggers
from mmlane.cli.units import size
from mmlane.host import PREFIXES, SharedMemory
from mmlane.patching import Decision
from mmlane.report import Report
from mmlane.settings import Settings, SettingsError

STYLES = {
    "applied": "green",
    "native": "cyan",
    "skipped": "yellow",
    "ok": "green",
    "missing": "yellow",
    "problem": "bold red",
    "note": "yellow",
}

SWEEPS = {
    "0": "leave what dead engines left",
    "1": "reclaim what is provably dead",
    "private": "reclaim what is provably dead; no other container uses this /dev/shm",
}

Row = tuple[str, ...]

# Click's, which newer releases of typer have inside.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class DoctorCommand(TyperCommand):
    """Where JSON was asked for, what is wrong with the command line is JSON, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        as_json = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            if not as_json:
                raise
            _fail(error.format_message(), USAGE)  # type: ignore[attr-defined]


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise typer.BadParameter(f"{text!r} is not a version; wanted something like 0.5.12.post1") from None


def doctor(
    engine: Annotated[
        Version | None,
        typer.Option(
            parser=_version,
            metavar="VERSION",
            help="Ask about this sglang release, installed or not; says nothing about this machine.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for notes, too.")] = False,
) -> None:
    """Show what mmlane would do in an engine started now, and whether this machine is fit for it.

    Reads the MMLANE* variables as the engine would. Changes nothing and does not import the engine.

    With --json, an object is printed whatever happens; its key "error" says why it tells nothing of an engine.

    Exit code: 0 all fine; 1 problems, or a patch that the engine lacks is skipped; 2 a wrong option or
    MMLANE* variable; 3 no sglang in this environment.
    """
    try:
        found = run_checks(engine)
    except SettingsError as error:
        if as_json:
            _fail(str(error), USAGE)
        typer.echo(f"{PREFIX}{error}", err=True)
        raise typer.Exit(USAGE) from None
    except Exception as error:
        if not as_json:
            raise
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", TROUBLE)
    if as_json:
        typer.echo(json.dumps(found.as_dict(strict), indent=2))
    else:
        with until_closed():
            render(found, console())
    raise typer.Exit(found.exit_code(strict))


def _fail(error: str, code: int) -> NoReturn:
    """Print an error as JSON, and exit."""
    typer.echo(json.dumps({"mmlane": __version__, "exit_code": code, "error": error}, indent=2))
    raise typer.Exit(code)


def render(found: Checks, console: Console) -> None:
    """What was found, for a person. Every state is a word, so nothing is lost without colour."""
    _head(found, console)
    if found.report is not None and not found.report.unsupported():
        _patches(found.report, console)
    if found.machine is not None:
        _this_machine(found.machine, found.settings, console)
    _verdict(found, console)


def _head(found: Checks, console: Console) -> None:
    title = Text(f"mmlane {__version__}", style="bold")
    if found.report is not None:
        title.append(f" on sglang {found.report.engine}")
        title.append(f" ({found.untested() or 'tested'})", style="not bold")
    console.print(title)
    engine = "by the table, not checked against its source" if found.root is None else str(found.root)
    _table(console, [("engine", "none found" if found.report is None else engine), *_settings(found)])


def _settings(found: Checks) -> Iterable[Row]:
    """All settings as what they amount to here."""
    chosen = found.settings
    capacity, pinned = lane_size.described(chosen, found.machine.memory if found.machine is not None else None)
    rows = {
        "mode": ("mode", "off: the engine runs as it is" if chosen.mode == "off" else chosen.mode),
        "disable": ("turned off", ", ".join(sorted(chosen.disable)) or "none"),
        "strict": ("strict", "yes" if chosen.strict else "no"),
        "log": ("log", chosen.log),
        "capacity": ("capacity", capacity),
        "pinned": ("pinned", pinned),
        "sweep": ("sweep", SWEEPS[chosen.sweep]),
    }
    for field, (title, text) in rows.items():
        yield title, f"{text} (default)" if chosen.is_default(field) else text


def _patches(report: Report, console: Console) -> None:
    _heading(console, "Patches", "applied: mmlane fixes it in an engine started now; native: the engine has it")
    _table(console, [_patch(decision) for decision in report.decisions])


def _patch(decision: Decision) -> Row:
    """A patch's state, and its fault, said such that a fixed fault is not taken for a present one."""
    id, reason = decision.spec.id, decision.explanation
    if decision.state in ("planned", "applied"):
        return "applied", id, f"fixes: {reason}"
    if decision.state == "native":
        return "native", id, f"already in the engine: {reason}"
    return decision.state, id, reason


def _this_machine(machine: Machine, chosen: Settings, console: Console) -> None:
    _heading(console, "Triggers", "how mmlane gets into the engine's processes")
    _table(console, _triggers(machine.triggers, chosen))
    _heading(console, "Memory")
    memory = machine.memory
    limit = f"{size(memory.limit)} by cgroup" if memory.limit is not None else "no cgroup limit"
    if memory.limit is not None and memory.used is not None:
        limit += f", {size(memory.used)} of it used"
    rows: list[Row] = [("machine", f"{size(memory.total)}, {limit}")]
    if machine.shm is None:
        rows.append(("/dev/shm", "missing"))
    else:
        rows.append((str(machine.shm.path), f"{size(machine.shm.total)}, {size(machine.shm.free)} free"))
        rows += _segments(machine.shm)
    _table(console, rows)
    _heading(console, "Kernel", "for the lane, each tried here")
    _table(
        console,
        [
            ("ok" if feature.works else "missing", feature.name, feature.problem or feature.purpose)
            for feature in machine.kernel
        ],
    )


def _triggers(found: Triggers, chosen: Settings) -> Iterable[Row]:
    line, point = found.start_file, found.entry_point
    if found.no_site:
        yield "missing", "startup hook", "not run: this Python was started with -S"
    elif line is None:
        yield "missing", "startup hook", ""
    elif found.ran:
        yield "ok", "startup hook", str(line)
    elif chosen.mode == "off":
        yield "ok", "startup hook", f"{line} (does nothing: MMLANE=off)"
    else:
        yield "missing", "startup hook", f"{line} (did not run)"
    yield "ok" if point else "missing", "entry point", point or ""


def _segments(shm: SharedMemory) -> Iterable[Row]:
    """One row for each kind of segment: how many, how much, and whether their makers run."""
    for prefix, kind in PREFIXES:
        mine = [segment for segment in shm.segments if segment.kind == kind]
        makers = [
            f"{count} {words}"
            for words, alive in (("maker runs", True), ("maker gone", False), ("maker unknown", None))
            if (count := sum(segment.alive is alive for segment in mine))
        ]
        held = size(sum(segment.bytes for segment in mine))
        plural = "" if len(mine) == 1 else "s"
        text = f"{len(mine)} segment{plural}, {held} ({', '.join(makers)})" if mine else "none"
        yield f"  {prefix}*", text


def _verdict(found: Checks, console: Console) -> None:
    problems, notes = found.problems(), found.notes()
    console.print()
    if not problems and not notes:
        console.print(Text("All fine.", style="bold green"))
        return
    _table(console, [("problem", str(one)) for one in problems] + [("note", line) for line in notes], indent=0)
    if not problems:
        console.print(Text("Fine, with the above noted.", style="bold green"))


def _heading(console: Console, title: str, explanation: str = "") -> None:
    console.print()
    heading = Text(title, style="bold")
    if explanation:
        heading.append(f"  {explanation}", style="not bold dim")
    console.print(heading)


def _table(console: Console, rows: Iterable[Row], indent: int = 2) -> None:
    rows = list(rows)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0]) - 1):
        widest = max(len(row[column]) for row in rows)
        table.add_column(no_wrap=True, min_width=widest + (indent if column == 0 else 0))
    table.add_column(overflow="fold", ratio=1)
    for row in rows:
        first = Text(" " * indent + row[0], style=STYLES.get(row[0], ""))
        table.add_row(first, *(Text(cell) for cell in row[1:]))
    console.print(table)
