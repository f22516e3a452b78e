"""`mmlane status`, `off` and `on`: the lanes that run on this machine, how they are, and a switch for them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmlane import PREFIX, host
from mmlane.cli.checks import FINE, TROUBLE
from mmlane.cli.console import console, is_live, until_closed
from mmlane.cli.units import size
from mmlane.lane.status import LaneStats, OtherUser, StatusError, ask, running, switch

NONE = (
    "No lane runs in this network namespace. An engine in mode lane (MMLANE=lane, the default) makes one at its "
    "first request with an image; one that cannot make one says so in its log at start, in a line with 'no lane'. "
    "Engines in other containers are not seen from here."
)
_TITLE = 60  # characters of a process's title to show
_INTERVAL = 1.0  # seconds between two looks of --watch
_AT_ONCE = 64  # lanes to ask


@dataclass(frozen=True)
class Found:
    """A lane and what it tells, or `problem`: why it does not.

    command: what its producer calls itself, in one line; "" if that is out of sight. is_ours: of this user, as
    far as one can tell.
    """

    name: str
    stats: LaneStats | None
    command: str = ""
    problem: str = ""
    is_ours: bool = True

    @property
    def pid(self) -> int:
        """The producer; by the number in the name, which is that of its own PID namespace, if need be."""
        return (self.stats and self.stats.pid) or int(self.name.split("-")[1])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. A key is always there; its value is null where there is nothing to tell."""
        return {
            "name": self.name,
            "pid": self.pid,
            "command": self.command or None,
            "problem": self.problem or None,
            "stats": self.stats and self.stats.as_dict(),
        }


def status(
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a JSON list, one object for each lane; with --watch, one line a look."),
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
) -> None:
    """Show the lanes that run on this machine: their readers, memory, tickets, puts and fallbacks.

    Lanes of other users, and those that do not answer within 2 seconds, are listed with the reason.

    Exit code: 0 also where there is no lane; 1 if lanes cannot be listed, with --json as {"error": "..."} in place
    of the list; 2 a wrong option.
    """
    try:
        with until_closed():
            if watch:
                _watch(as_json)
            elif as_json:
                typer.echo(_as_json(look(), indent=2))
            else:
                console().print(render(look()))
    except StatusError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error)}))
        else:
            typer.echo(f"{PREFIX}{error}", err=True)
        raise typer.Exit(TROUBLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(FINE) from None


def _watch(as_json: bool) -> None:
    """Look over and over: in place on a terminal, else one look after the other."""
    out = console()
    if not as_json and is_live(out):
        with Live(render(look()), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(_INTERVAL)
                live.update(render(look()), refresh=True)
    while True:
        if as_json:
            typer.echo(_as_json(look(), separators=(",", ":")))
        else:
            out.print(Text(f"--- {datetime.now().astimezone().isoformat(timespec='seconds')}"), render(look()))
        time.sleep(_INTERVAL)


def _as_json(lanes: list[Found], **form: Any) -> str:
    return json.dumps([lane.as_dict() for lane in lanes], **form)


def off(
    pid: Annotated[int | None, typer.Argument(help="Process whose lanes to switch off.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All lanes of this user.")] = False,
) -> None:
    """Switch running lanes off: their engines go on by shared-memory segments, at once and without a restart.

    Features that are in a lane are still taken from there; its memory goes back to the system when it is unused.
    `mmlane on` undoes this.

    Exit code: 0 if there were lanes and all of them were switched, 1 if not, 2 a wrong option.
    """
    _switch_all(pid, everything, off=True)


def on(
    pid: Annotated[int | None, typer.Argument(help="Process whose lanes to switch on.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All lanes of this user.")] = False,
) -> None:
    """Switch lanes on again that `mmlane off` has switched off.

    Exit code: 0 if there were lanes and all of them were switched, 1 if not, 2 a wrong option.
    """
    _switch_all(pid, everything, off=False)


def _switch_all(pid: int | None, everything: bool, *, off: bool) -> None:
    if (pid is None) != everything:
        raise typer.BadParameter("name a PID, as `mmlane status` shows it, or --all")
    try:
        found = look()
    except StatusError as error:
        typer.echo(f"{PREFIX}{error}", err=True)
        raise typer.Exit(TROUBLE) from None
    lanes = [lane for lane in found if (lane.is_ours if everything else lane.pid == pid)]
    if not lanes:
        whose = "this user" if everything else f"process {pid}"
        typer.echo(f"{PREFIX}no lane of {whose}; `mmlane status` lists all" if found else NONE, err=True)
        raise typer.Exit(TROUBLE)
    failed = False
    for lane in lanes:
        try:
            typer.echo(f"{lane.name}: {switch(lane.name, off).state}")
        except StatusError as error:
            failed = True
            typer.echo(f"{PREFIX}{error}", err=True)
    if failed:
        raise typer.Exit(TROUBLE)


def look() -> list[Found]:
    """Ask all lanes that run. Raises StatusError where they cannot be listed."""
    names = running()
    # At once: any user can have names here at which no process answers, thousands of them.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_found, names))


def _found(name: str) -> Found:
    try:
        stats = ask(name)
    except StatusError as error:
        return Found(name, None, problem=str(error), is_ours=not isinstance(error, OtherUser))
    return Found(name, stats, host.command_line(stats.pid))


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
        parts += [Text(lane.name, style="bold"), table]
    return Group(*parts)


def _rows(lane: LaneStats) -> Iterator[tuple[str, str, str]]:
    """Name, text and style of what there is to say about a lane."""
    missing = [
        f"{number} of {group!r}"
        for group, wanted in lane.expected_readers.items()
        for number in sorted(set(range(wanted)).difference(lane.joined_readers.get(group, ())))
    ]
    if lane.state == "waiting":
        yield "state", f"waiting for readers: {', '.join(missing)}", "yellow"
    elif lane.state == "off":
        yield "state", "off: puts are refused until `mmlane on`", "yellow"
    else:
        yield "state", lane.state, "green" if lane.state == "open" else "yellow"
    joined = {group: len(lane.joined_readers.get(group, ())) for group in lane.expected_readers}
    readers = ", ".join(f"{group!r} {joined[group]}/{wanted}" for group, wanted in lane.expected_readers.items())
    yield "readers", f"joined/expected: {readers}", ""
    pinned = f" ({size(lane.pinned_bytes)} of it pinned)" if lane.pinned_bytes else ""
    yield (
        "memory",
        f"{size(lane.used_bytes)} used by {_count(lane.extents, 'extent')},"
        f" {size(lane.committed_bytes)} committed{pinned},"
        f" {size(lane.capacity_bytes)} capacity",
        "",
    )
    yield "tickets", f"{lane.tickets} out, {lane.lost_tickets} lost and reclaimed", ""
    speed = f" ({size(round(lane.copied_bytes / lane.copy_seconds))}/s)" if lane.copy_seconds else ""
    yield (
        "puts",
        f"{lane.puts}, {lane.shared_puts} of them shared (no copy); {size(lane.copied_bytes)} copied, copy time"
        f" {lane.copy_seconds:.3g} s{speed}",
        "",
    )
    fallbacks = ", ".join(f"{count} {cause}" for cause, count in sorted(lane.fallbacks.items()))
    yield "fallbacks", fallbacks or "none", "yellow" if fallbacks else ""
    if lane.malformed_messages:
        yield "messages", f"{lane.malformed_messages} malformed and ignored", "yellow"
    if lane.rejected_peers:
        yield "peers", f"{_count(lane.rejected_peers, 'process', 'es')} rejected", "yellow"
    for line in lane.degraded:
        yield "degraded", f"without {line}", "yellow"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"
