"""`mmlane status`: the lanes that run on this machine, and how they do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmlane.cli.examination import FINE, TROUBLE
from mmlane.cli.units import size
from mmlane.lane.status import LaneStats, StatusError, ask, running

NONE = (
    "No lane runs in this network namespace. An engine in mode arena (MMLANE=arena, the default) makes one at its "
    "first request with an image; one that cannot make one says so in its log at start, in a line with 'no lane'. "
    "Engines in other containers are not seen from here."
)
_TITLE = 60  # characters of a process's title to show
_INTERVAL = 1.0  # seconds between two looks of --watch


@dataclass(frozen=True)
class Found:
    """A lane and what it tells, or `problem`: why it does not.

    command: what its producer calls itself, in one line; "" if that is out of sight.
    """

    address: str
    stats: LaneStats | None
    command: str = ""
    problem: str = ""

    @property
    def pid(self) -> int:
        """The producer; by the number in the address, which is that of its own PID namespace, if need be."""
        return (self.stats and self.stats.pid) or int(self.address.split("-")[1])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. A key is always there; its value is null where there is nothing to tell."""
        return {
            "address": self.address,
            "pid": self.pid,
            "command": self.command or None,
            "problem": self.problem or None,
            "stats": self.stats and asdict(self.stats),
        }


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object for each lane.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
) -> None:
    """Show the lanes that run on this machine: their readers, memory, tickets, puts and refusals.

    Lanes of other users, and those that do not answer within 2 seconds, are listed with the reason.

    Exit code: 0 also where there is no lane; 1 if lanes cannot be listed; 2 a wrong option.
    """
    if as_json and watch:
        raise typer.BadParameter("--json and --watch: one of the two")
    console = Console(highlight=False)
    try:
        if as_json:
            typer.echo(json.dumps([lane.as_dict() for lane in look()], indent=2))
        elif watch:
            _watch(console)
        else:
            console.print(render(look()))
    except StatusError as error:
        typer.echo(f"mmlane: {error}", err=True)
        raise typer.Exit(TROUBLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(FINE) from None


def _watch(console: Console) -> None:
    with Live(render(look()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_INTERVAL)
            live.update(render(look()), refresh=True)


def look() -> list[Found]:
    """Ask all lanes that run. Raises StatusError where they cannot be listed."""
    return [_found(address) for address in running()]


def _found(address: str) -> Found:
    try:
        stats = ask(address)
    except StatusError as error:
        return Found(address, None, problem=str(error))
    return Found(address, stats, _command(stats.pid))


def _command(pid: int) -> str:
    """What a process calls itself, in one line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    except OSError:  # it has just ended, or is out of sight
        return ""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(words))


def render(lanes: list[Found]) -> Group:
    """The lanes for a person. Every state is a word, so nothing is lost without colour."""
    if not lanes:
        return Group(Text(NONE))
    parts: list[Text | Table] = []
    for lane in lanes:
        if parts:
            parts.append(Text())
        if lane.stats is None:
            parts.append(Text(lane.problem, style="yellow"))
            continue
        title = lane.command or "out of sight, in another PID namespace"
        if len(title) > _TITLE:
            title = f"{title[: _TITLE - 1]}…"
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text, style in (("process", f"{lane.pid}  {title}", ""), *_rows(lane.stats)):
            table.add_row(f"  {name}", Text(text, style=style))
        parts += [Text(lane.address, style="bold"), table]
    return Group(*parts)


def _rows(lane: LaneStats) -> Iterator[tuple[str, str, str]]:
    """Name, text and style of what there is to say about a lane."""
    joined = {group: (lane.readers.get(group, 0), wanted) for group, wanted in lane.expected.items()}
    missing = [f"{wanted - have} in {group!r}" for group, (have, wanted) in joined.items() if have < wanted]
    if lane.is_open:
        yield "state", "open", "green"
    else:
        yield "state", f"waiting for readers: {', '.join(missing)}" if missing else "closed", "yellow"
    yield "readers", ", ".join(f"{group!r} {have}/{wanted}" for group, (have, wanted) in joined.items()), ""
    yield (
        "memory",
        f"{size(lane.taken)} in use by {_count(lane.extents, 'extent')},"
        f" {size(lane.warm)} committed{f' ({size(lane.pinned)} of it to be pinned)' * bool(lane.pinned)},"
        f" {size(lane.capacity)} capacity",
        "",
    )
    yield "tickets", f"{lane.tickets} out, {_count(lane.orphans, 'orphan')} reclaimed", ""
    speed = f" ({size(round(lane.copied / lane.copy_seconds))}/s)" if lane.copy_seconds else ""
    yield (
        "puts",
        f"{lane.puts}, {lane.shared} of them without a copy; {size(lane.copied)} copied in"
        f" {lane.copy_seconds:.3g} s{speed}",
        "",
    )
    refused = ", ".join(f"{count} {cause}" for cause, count in sorted(lane.refused.items()))
    yield "refused", refused or "none", "yellow" if refused else ""
    if lane.strays or lane.strangers:
        strays = _count(lane.strays, "message")
        yield "nonsense", f"{strays} from readers, {_count(lane.strangers, 'visitor')} sent away", "yellow"
    for line in lane.degraded:
        yield "without", line, "yellow"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
