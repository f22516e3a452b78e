"""`mmlane status`: which sockets are lanes, and how what lanes tell is put into words."""

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
from mmlane.lane.status import LaneStats, StatusError, running

ADDRESS = "mmlane-123-abcdef"
MODULE = import_module("mmlane.cli.status")  # by its name, the package has the command


def stats(**changes: object) -> LaneStats:
    """An open lane at rest, but for these."""
    facts: dict[str, object] = {
        "address": ADDRESS,
        "pid": 123,
        "is_open": True,
        "capacity": 8 << 30,
        "warm": 64 << 20,
        "pinned": 0,
        "taken": 0,
        "extents": 0,
        "tickets": 0,
        "expected": {"tp": 2},
        "readers": {"tp": 2},
        "puts": 0,
        "shared": 0,
        "copied": 0,
        "copy_seconds": 0.0,
        "refused": {},
        "orphans": 0,
        "strays": 0,
        "strangers": 0,
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
    assert [address for address in running() if number in address] == [lane]


def test_a_lane_is_listed_once_whoever_is_connected_and_by_its_pid(scope: ExitStack) -> None:
    number = secrets.token_hex(8)
    lanes = [f"mmlane-{pid}-{number}" for pid in (9, 10, 100)]
    for lane in reversed(lanes):
        listener = bound(scope, lane)
        listener.listen()
        for _ in range(3):
            scope.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(f"\0{lane}")
        scope.enter_context(listener.accept()[0])
    assert [address for address in running() if number in address] == lanes


# --- in words ---


def test_an_open_lane() -> None:
    memory = stats(taken=2 << 20, extents=2)
    lane = replace(memory, tickets=1, puts=5, shared=2, copied=3 << 30, copy_seconds=1.5)
    text = said(Found(ADDRESS, lane, "sglang serve"))
    assert text.splitlines()[0] == ADDRESS
    for words in (
        "123  sglang serve",
        "open",
        "'tp' 2/2",
        "2 MiB in use by 2 extents, 64 MiB committed, 8 GiB capacity",
        "1 out, 0 orphans reclaimed",
        "5, 2 of them without a copy; 3 GiB copied in 1.5 s (2 GiB/s)",
        "none",
    ):
        assert words in text
    assert "nonsense" not in text and "without  " not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_open": False, "readers": {}}, "waiting for readers: 2 in 'tp'"),
        ({"pinned": 32 << 20}, "64 MiB committed (32 MiB of it to be pinned), 8 GiB capacity"),
        (
            {"is_open": False, "expected": {"tp": 2, "vit": 1}, "readers": {"tp": 2}},
            "waiting for readers: 1 in 'vit'",
        ),
        ({"is_open": False}, "closed"),
        ({"readers": {"tp": 3}}, "'tp' 3/2"),
        ({"refused": {"not_open": 3, "full": 1}}, "1 full, 3 not_open"),
        ({"orphans": 1}, "1 orphan reclaimed"),
        ({"strays": 1, "strangers": 2}, "1 message from readers, 2 visitors sent away"),
        ({"degraded": ("hole punching: no",)}, "hole punching: no"),
        ({"expected": {"[red]tp": 1}, "readers": {}, "is_open": False}, "'[red]tp' 0/1"),
    ],
)
def test_what_is_out_of_the_ordinary_has_its_words(changes: dict[str, object], words: str) -> None:
    assert words in said(Found(ADDRESS, stats(**changes)))


def test_a_long_command_is_cut_and_one_out_of_sight_is_said_so() -> None:
    assert f"123  {'x' * 59}…\n" in said(Found(ADDRESS, stats(), "x" * 500))
    assert "123  out of sight, in another PID namespace" in said(Found(ADDRESS, stats(pid=0)))


def test_a_lane_that_cannot_be_asked_is_one_line_among_the_others() -> None:
    problem = f"lane {ADDRESS} does not tell its status: it belongs to user 7, this is user 8"
    mute = Found(ADDRESS, None, problem=problem)
    other = Found("mmlane-9-99", stats(address="mmlane-9-99"))
    lines = said(mute, other).splitlines()
    assert lines[:3] == [problem, "", "mmlane-9-99"]
    assert mute.as_dict() == {"address": ADDRESS, "pid": 123, "command": None, "problem": problem, "stats": None}


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
