"""`mmlane status`, `off` and `on`: which sockets are lanes, what they tell in words, and which are switched."""

from __future__ import annotations

import io
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmlane.cli import app
from mmlane.cli.status import Found, render
from mmlane.lane.status import LaneStats, OtherUser, StatusError, running

NAME = "mmlane-123-abcdef"
MODULE = import_module("mmlane.cli.status")  # by its name, the package has the command


def stats(**changes: object) -> LaneStats:
    """An open lane at rest, but for these."""
    facts: dict[str, object] = {
        "name": NAME,
        "pid": 123,
        "state": "open",
        "capacity_bytes": 8 << 30,
        "committed_bytes": 64 << 20,
        "pinned_bytes": 0,
        "used_bytes": 0,
        "extents": 0,
        "tickets": 0,
        "expected": {"tp": 2},
        "joined": {"tp": [0, 1]},
        "puts": 0,
        "shared": 0,
        "copied_bytes": 0,
        "copy_seconds": 0.0,
        "fallbacks": {},
        "lost_tickets": 0,
        "malformed_messages": 0,
        "rejected_peers": 0,
        "degraded": (),
        **changes,
    }
    return LaneStats(**facts)  # type: ignore[arg-type]


def said(*lanes: Found, width: int = 200) -> str:
    """What a person reads."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(list(lanes)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


# --- which sockets are lanes ---


@pytest.fixture
def scope() -> Iterator[ExitStack]:
    with ExitStack() as scope:
        yield scope


def bound(scope: ExitStack, name: str, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
    """A socket of that name."""
    one = scope.enter_context(socket.socket(socket.AF_UNIX, kind))
    one.bind(f"\0{name}")
    return one


def test_only_listening_sockets_of_a_lanes_name_are_lanes(scope: ExitStack) -> None:
    number = secrets.token_hex(8)
    lane = f"mmlane-{os.getpid()}-{number}"
    bound(scope, lane).listen()
    for other in (f"mmlane-test-{number}", f"xmmlane-1-{number}", f"mmlane-1-{number}-x", f"mmlane-1-{number} x"):
        bound(scope, other).listen()
    bound(scope, f"mmlane-2-{number}")  # does not listen
    bound(scope, f"mmlane-3-{number}", socket.SOCK_STREAM).listen()
    bound(scope, f"mmlane-4-{number}", socket.SOCK_DGRAM)
    assert [name for name in running() if number in name] == [lane]


def test_a_lane_is_listed_once_whoever_is_connected_and_by_its_pid(scope: ExitStack) -> None:
    number = secrets.token_hex(8)
    lanes = [f"mmlane-{pid}-{number}" for pid in (9, 10, 100)]
    for lane in reversed(lanes):
        listener = bound(scope, lane)
        listener.listen()
        for _ in range(3):
            scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(f"\0{lane}")
        scope.enter_context(listener.accept()[0])
    assert [name for name in running() if number in name] == lanes


# --- in words ---


def test_an_open_lane() -> None:
    lane = stats(
        used_bytes=2 << 20, extents=2, tickets=1, puts=5, shared=2, copied_bytes=3 << 30, copy_seconds=1.5
    )
    text = said(Found(NAME, lane, "sglang serve"))
    assert text.splitlines()[0] == NAME
    for words in (
        "123  sglang serve",
        "open",
        "'tp' 2/2",
        "2 MiB used by 2 extents, 64 MiB committed, 8 GiB capacity",
        "1 out, 0 lost and reclaimed",
        "5, 2 of them without a copy; 3 GiB copied in 1.5 s (2 GiB/s)",
        "none",
    ):
        assert words in text
    assert "rejected" not in text and "without  " not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "waiting", "joined": {"tp": []}}, "waiting for readers: 0 of 'tp', 1 of 'tp'"),
        ({"state": "waiting", "joined": {"tp": [0]}}, "waiting for readers: 1 of 'tp'"),
        (
            {"state": "waiting", "expected": {"tp": 2, "vit": 1}, "joined": {"tp": [0, 1]}},
            "waiting for readers: 0 of 'vit'",
        ),
        ({"pinned_bytes": 32 << 20}, "64 MiB committed (32 MiB of it to be pinned), 8 GiB capacity"),
        ({"state": "closed"}, "closed"),
        ({"state": "off"}, "off: puts are refused until `mmlane on`"),
        ({"state": "off", "joined": {"tp": [0]}}, "'tp' 1/2"),
        ({"fallbacks": {"not_open": 3, "full": 1}}, "1 full, 3 not_open"),
        ({"lost_tickets": 1}, "1 lost and reclaimed"),
        ({"malformed_messages": 1, "rejected_peers": 2}, "1 malformed message, 2 processes"),
        ({"malformed_messages": 2, "rejected_peers": 1}, "2 malformed messages, 1 process"),
        ({"degraded": ("hole punching: no",)}, "hole punching: no"),
        ({"expected": {"[red]tp": 1}, "joined": {}, "state": "waiting"}, "'[red]tp' 0/1"),
    ],
)
def test_what_is_out_of_the_ordinary_has_its_words(changes: dict[str, object], words: str) -> None:
    assert words in said(Found(NAME, stats(**changes)))


def test_a_long_command_is_cut_and_one_out_of_sight_is_said_so() -> None:
    assert f"123  {'x' * 59}…\n" in said(Found(NAME, stats(), "x" * 500))
    assert "123  out of sight, in another PID namespace" in said(Found(NAME, stats(pid=0)))


def test_a_lane_that_cannot_be_asked_is_one_line_among_the_others() -> None:
    problem = f"lane {NAME} does not tell its status: it belongs to user 7, this is user 8"
    mute = Found(NAME, None, problem=problem)
    other = Found("mmlane-9-99", stats(name="mmlane-9-99"))
    lines = said(mute, other).splitlines()
    assert lines[:3] == [problem, "", "mmlane-9-99"]
    assert mute.as_dict() == {"name": NAME, "pid": 123, "command": None, "problem": problem, "stats": None}


# --- usage ---


def test_json_and_watch_exclude_each_other() -> None:
    done = CliRunner().invoke(app, ["status", "--json", "--watch"])
    assert done.exit_code == 2 and "--json and --watch" in done.output


@pytest.mark.parametrize("words", [[], ["--json"], ["--watch"]])
def test_lanes_that_cannot_be_listed_are_a_clear_error(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[str, ...]:
        raise StatusError("the lanes of this machine cannot be listed: no /proc")

    monkeypatch.setattr(MODULE, "running", fail)
    done = CliRunner().invoke(app, ["status", *words])
    assert done.exit_code == 1 and "mmlane: the lanes of this machine cannot be listed: no /proc" in done.output


def test_no_lane_is_one_line_that_says_what_would_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "running", lambda: ())
    done = CliRunner().invoke(app, ["status"], env={"COLUMNS": "300"})
    assert done.exit_code == 0
    (line,) = done.output.splitlines()
    assert "No lane" in line and "MMLANE=arena" in line and "image" in line
    done = CliRunner().invoke(app, ["status", "--json"])
    assert (done.exit_code, done.output) == (0, "[]\n")


# --- off and on ---


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> dict[str, LaneStats | StatusError]:
    """What runs here instead of the lanes of this machine: name -> its state, or why it does not tell."""
    found: dict[str, LaneStats | StatusError] = {}

    def tell(name: str) -> LaneStats:
        if isinstance(answer := found[name], StatusError):
            raise answer
        return answer

    def switch(name: str, off: bool) -> LaneStats:
        found[name] = replace(tell(name), state="off" if off else "open")
        return tell(name)

    monkeypatch.setattr(MODULE, "running", lambda: tuple(found))
    monkeypatch.setattr(MODULE, "ask", tell)
    monkeypatch.setattr(MODULE, "switch", switch)
    return found


def states(lanes: dict[str, LaneStats | StatusError]) -> list[str]:
    return [lane.state for lane in lanes.values() if isinstance(lane, LaneStats)]


def test_the_lanes_of_one_process_are_switched_off_and_on(lanes: dict[str, LaneStats | StatusError]) -> None:
    for name, pid in (("mmlane-7-a", 7), ("mmlane-7-b", 7), ("mmlane-8-c", 8)):
        lanes[name] = stats(name=name, pid=pid)
    done = CliRunner().invoke(app, ["off", "7"])
    assert (done.exit_code, done.output) == (0, "mmlane-7-a: off\nmmlane-7-b: off\n")
    assert states(lanes) == ["off", "off", "open"]
    done = CliRunner().invoke(app, ["on", "7"])
    assert (done.exit_code, done.output) == (0, "mmlane-7-a: open\nmmlane-7-b: open\n")
    assert states(lanes) == ["open"] * 3


def test_all_lanes_of_this_user_are_switched_and_those_of_others_are_no_failure(
    lanes: dict[str, LaneStats | StatusError],
) -> None:
    lanes["mmlane-7-a"] = stats(name="mmlane-7-a", pid=7)
    lanes["mmlane-8-b"] = OtherUser("lane mmlane-8-b does not tell its status: it belongs to user 8")
    lanes["mmlane-9-c"] = stats(name="mmlane-9-c", pid=9)
    done = CliRunner().invoke(app, ["off", "--all"])
    assert (done.exit_code, done.output) == (0, "mmlane-7-a: off\nmmlane-9-c: off\n")
    assert CliRunner().invoke(app, ["on", "--all"]).exit_code == 0
    assert states(lanes) == ["open"] * 2


@pytest.mark.parametrize("words", [["--all"], ["8"]])
def test_a_lane_that_cannot_be_switched_is_a_failure_and_the_others_are_switched(
    lanes: dict[str, LaneStats | StatusError], words: list[str]
) -> None:
    problem = "lane mmlane-8-b does not tell its status: no answer within 2 s"
    lanes["mmlane-8-b"] = StatusError(problem)
    lanes["mmlane-9-c"] = stats(name="mmlane-9-c", pid=8)
    done = CliRunner().invoke(app, ["off", *words])
    assert done.exit_code == 1
    assert f"mmlane: {problem}\n" in done.output and "mmlane-9-c: off\n" in done.output


@pytest.mark.parametrize("command", ["off", "on"])
def test_a_lane_of_another_user_cannot_be_switched_by_its_pid(
    lanes: dict[str, LaneStats | StatusError], command: str
) -> None:
    lanes["mmlane-8-b"] = OtherUser("lane mmlane-8-b does not tell its status: it belongs to user 8")
    done = CliRunner().invoke(app, [command, "8"])
    assert done.exit_code == 1 and "it belongs to user 8" in done.output


@pytest.mark.parametrize("command", ["off", "on"])
def test_nothing_to_switch_is_a_failure_that_says_so(
    lanes: dict[str, LaneStats | StatusError], command: str
) -> None:
    done = CliRunner().invoke(app, [command, "--all"])
    assert done.exit_code == 1 and "No lane runs" in done.output
    lanes["mmlane-7-a"] = OtherUser("it belongs to user 8")
    done = CliRunner().invoke(app, [command, "--all"])
    assert done.exit_code == 1 and "no lane of this user; `mmlane status` lists all" in done.output
    done = CliRunner().invoke(app, [command, "8"])
    assert done.exit_code == 1 and "no lane of process 8; `mmlane status` lists all" in done.output


@pytest.mark.parametrize("command", ["off", "on"])
@pytest.mark.parametrize("words", [[], ["7", "--all"]])
def test_a_pid_or_all_is_needed(command: str, words: list[str]) -> None:
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 2 and "--all" in done.output


@pytest.mark.parametrize("command", ["off", "on"])
def test_switching_where_lanes_cannot_be_listed_is_a_clear_error(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> tuple[str, ...]:
        raise StatusError("the lanes of this machine cannot be listed: no /proc")

    monkeypatch.setattr(MODULE, "running", fail)
    done = CliRunner().invoke(app, [command, "--all"])
    assert done.exit_code == 1 and "mmlane: the lanes of this machine cannot be listed: no /proc" in done.output
