"""`mmlane status`: which sockets are lanes, and how what lanes tell is put into words. `mmlane off` and `on`."""

from __future__ import annotations

import io
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmlane.cli import app
from mmlane.cli.status import Found, render
from mmlane.lane.status import LaneStats, OtherUser, StatusError, ask, running

if TYPE_CHECKING:  # which needs torch
    from mmlane.lane import Lane

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
    memory = stats(used_bytes=2 << 20, extents=2)
    lane = replace(memory, tickets=1, puts=5, shared=2, copied_bytes=3 << 30, copy_seconds=1.5)
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
        ({"state": "waiting", "joined": {}}, "waiting for readers: 0 of 'tp', 1 of 'tp'"),
        ({"pinned_bytes": 32 << 20}, "64 MiB committed (32 MiB of it to be pinned), 8 GiB capacity"),
        (
            {"state": "waiting", "expected": {"tp": 3, "vit": 1}, "joined": {"tp": [0, 2], "vit": [0]}},
            "waiting for readers: 1 of 'tp'",
        ),
        ({"state": "off"}, "off: puts are refused until `mmlane on`"),
        ({"state": "closed"}, "closed"),
        ({"joined": {"tp": [1]}}, "'tp' 1/2"),
        ({"fallbacks": {"not_open": 3, "full": 1}}, "1 full, 3 not_open"),
        ({"lost_tickets": 1}, "1 lost and reclaimed"),
        ({"malformed_messages": 1, "rejected_peers": 2}, "1 malformed message, 2 processes"),
        ({"rejected_peers": 1}, "0 malformed messages, 1 process"),
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
def two(scope: ExitStack, monkeypatch: pytest.MonkeyPatch) -> list[Lane]:
    """Two lanes of this process; others that may run on this machine are out of sight."""
    pytest.importorskip("torch")
    from mmlane.lane import Lane

    lanes = [scope.enter_context(Lane({"tp": 1}, capacity=4 << 20)) for _ in range(2)]
    monkeypatch.setattr(MODULE, "running", lambda: tuple(lane.name for lane in lanes))
    return lanes


@pytest.mark.parametrize("which", [["--all"], [str(os.getpid())]])
def test_lanes_are_switched_off_and_on(which: list[str], two: list[Lane]) -> None:
    for word, state in (("off", "off"), ("off", "off"), ("on", "waiting"), ("on", "waiting")):
        done = CliRunner().invoke(app, [word, *which])
        assert (done.exit_code, done.output) == (0, "".join(f"{lane.name}: {state}\n" for lane in two))
        assert [lane.state for lane in two] == [state] * 2


def test_only_lanes_of_the_process_that_was_named_are_switched(two: list[Lane]) -> None:
    other = 1 if os.getpid() != 1 else 2
    done = CliRunner().invoke(app, ["off", str(other)])
    assert done.exit_code == 1 and f"no lane of process {other}; `mmlane status`" in done.output
    assert [lane.state for lane in two] == ["waiting"] * 2


def test_a_lane_that_cannot_be_switched_keeps_none_of_the_others(
    two: list[Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [two[0].name, NAME, two[1].name]
    monkeypatch.setattr(MODULE, "running", lambda: tuple(names))
    done = CliRunner().invoke(app, ["off", "--all"])
    assert done.exit_code == 1 and f"mmlane: lane {NAME} does not tell its status: nobody listens" in done.output
    assert [lane.state for lane in two] == ["off"] * 2


@pytest.mark.parametrize("word", ["off", "on"])
@pytest.mark.parametrize("words", [[], ["123", "--all"], ["abc"]])
def test_it_must_be_clear_which_lanes_are_meant(word: str, words: list[str], two: list[Lane]) -> None:
    assert CliRunner().invoke(app, [word, *words]).exit_code == 2
    assert [lane.state for lane in two] == ["waiting"] * 2


@pytest.mark.parametrize("word", ["off", "on"])
def test_where_no_lane_runs_nothing_was_switched(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "running", lambda: ())
    done = CliRunner().invoke(app, [word, "--all"])
    assert done.exit_code == 1 and "No lane runs in this network namespace" in done.output


@pytest.mark.parametrize("word", ["off", "on"])
def test_lanes_that_cannot_be_listed_are_not_switched(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[str, ...]:
        raise StatusError("the lanes of this machine cannot be listed: no /proc")

    monkeypatch.setattr(MODULE, "running", fail)
    done = CliRunner().invoke(app, [word, "--all"])
    assert done.exit_code == 1 and "cannot be listed: no /proc" in done.output


FOREIGN = "mmlane-8-abcdef"


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane of another user is there, too."""

    def tell(name: str) -> LaneStats:
        if name == FOREIGN:
            raise OtherUser(f"lane {name} does not tell its status: it belongs to user 8, this is user 9")
        return ask(name)

    ours = MODULE.running
    monkeypatch.setattr(MODULE, "running", lambda: (FOREIGN, *ours()))
    monkeypatch.setattr(MODULE, "ask", tell)


def test_all_lanes_of_this_user_are_switched_and_those_of_others_are_no_failure(
    two: list[Lane], foreign: None
) -> None:
    done = CliRunner().invoke(app, ["off", "--all"])
    assert (done.exit_code, done.output) == (0, "".join(f"{lane.name}: off\n" for lane in two))


@pytest.mark.parametrize("word", ["off", "on"])
def test_a_lane_of_another_user_cannot_be_switched_by_its_pid(word: str, two: list[Lane], foreign: None) -> None:
    done = CliRunner().invoke(app, [word, "8"])
    assert done.exit_code == 1 and f"mmlane: lane {FOREIGN}" in done.output
    assert [lane.state for lane in two] == ["waiting"] * 2


def test_where_only_others_have_lanes_nothing_was_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(name: str) -> LaneStats:
        raise OtherUser("it belongs to user 8, this is user 9")

    monkeypatch.setattr(MODULE, "running", lambda: (FOREIGN,))
    monkeypatch.setattr(MODULE, "ask", tell)
    done = CliRunner().invoke(app, ["off", "--all"])
    assert done.exit_code == 1 and "no lane of this user; `mmlane status` lists all" in done.output
