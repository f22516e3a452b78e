"""`mmlane status`: which sockets are lanes, and how what lanes tell is put into words. `mmlane off` and `on`."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from datetime import datetime
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmlane.cli import app
from mmlane.cli.console import console
from mmlane.cli.status import Found, render
from mmlane.lane.status import FORMER, LaneStats, OtherUser, StatusError, ask, running

if TYPE_CHECKING:  # which needs torch
    from mmlane.lane import Lane

NAME = "mmlane-123-abcdef"
DEADLINE = 90.0  # seconds; only a fault takes that long
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
        "expected_readers": {"tp": 2},
        "joined_readers": {"tp": [0, 1]},
        "puts": 0,
        "shared_puts": 0,
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


def test_a_lane_is_listed_once_whatever_is_connected_and_in_the_order_of_pids(scope: ExitStack) -> None:
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
    lane = replace(memory, tickets=1, puts=5, shared_puts=2, copied_bytes=3 << 30, copy_seconds=1.5)
    text = said(Found(NAME, lane, "sglang serve"))
    assert text.splitlines()[0] == NAME
    for words in (
        "123  sglang serve",
        "open",
        "'tp' 2/2",
        "2 MiB used by 2 extents, 64 MiB committed, 8 GiB capacity",
        "1 out, 0 lost and reclaimed",
        "5, 2 of them shared (no copy); 3 GiB copied, copy time 1.5 s (2 GiB/s)",
        "none",
    ):
        assert words in text
    assert not {"rejected", "malformed", "degraded"} & set(text.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "waiting", "joined_readers": {}}, "waiting for readers: 0 of 'tp', 1 of 'tp'"),
        ({"pinned_bytes": 32 << 20}, "64 MiB committed (32 MiB of it pinned), 8 GiB capacity"),
        (
            {
                "state": "waiting",
                "expected_readers": {"tp": 3, "vit": 1},
                "joined_readers": {"tp": [0, 2], "vit": [0]},
            },
            "waiting for readers: 1 of 'tp'",
        ),
        ({"state": "off"}, "off: puts are refused until `mmlane on`"),
        ({"state": "closed"}, "closed"),
        ({"joined_readers": {"tp": [1]}}, "'tp' 1/2"),
        ({"fallbacks": {"not_open": 3, "full": 1}}, "1 full, 3 not_open"),
        ({"lost_tickets": 1}, "1 lost and reclaimed"),
        ({"malformed_messages": 1}, "messages   1 malformed and ignored"),
        ({"rejected_peers": 1}, "peers      1 process rejected"),
        ({"rejected_peers": 2}, "peers      2 processes rejected"),
        ({"degraded": ("hole punching: no",)}, "degraded   without hole punching: no"),
        ({"expected_readers": {"[red]tp": 1}, "joined_readers": {}, "state": "waiting"}, "'[red]tp' 0/1"),
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


# --- one name for a figure ---


def test_a_person_reads_the_words_of_the_name_that_programs_read() -> None:
    """Each figure, in the line that shows it; so a new one cannot be called something else here."""
    numbers = dict(zip((field.name for field in fields(LaneStats)), count(11), strict=False))
    special = {
        "state": "open",
        "expected_readers": {"tp": 91},
        "joined_readers": {"tp": list(range(90))},
        "fallbacks": {"full": 92},
        "degraded": ("hole punching: no",),
    }
    shown = {**special, "fallbacks": "92 full", "expected_readers": "90/91", "joined_readers": "90/91"}
    shown["degraded"] = "hole punching: no"
    text = said(Found(NAME, stats(**{**numbers, **special, "name": NAME})))
    for name in numbers.keys() - {"name", "pid"}:
        words = name.removesuffix("_bytes").removesuffix("_seconds").split("_")
        wanted = str(shown.get(name, f"{numbers[name]}{' B' if name.endswith('_bytes') else ''}"))
        lines = [line for line in text.splitlines() if re.search(rf"\b{re.escape(wanted)}\b", line)]
        assert any(all(word.removesuffix("s") in line for word in words) for line in lines), (name, text)


def test_json_has_the_former_names_as_well() -> None:
    found = Found(NAME, stats(shared_puts=3)).as_dict()["stats"]
    former = {was.key: name for name, was in FORMER.items() if was.key}
    assert found.keys() == {field.name for field in fields(LaneStats)} | former.keys()
    for was, name in former.items():
        assert found[was] == found[name] == getattr(stats(shared_puts=3), was)
    assert FORMER.keys() <= {field.name for field in fields(LaneStats)}


# --- usage ---


def cannot_list() -> tuple[str, ...]:
    raise StatusError("the lanes of this machine cannot be listed: no /proc")


@pytest.mark.parametrize("words", [[], ["--watch"]])
def test_lanes_that_cannot_be_listed_are_a_clear_error(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "running", cannot_list)
    done = CliRunner().invoke(app, ["status", *words])
    assert done.exit_code == 1 and done.stderr == "mmlane: the lanes of this machine cannot be listed: no /proc\n"


@pytest.mark.parametrize("words", [["--json"], ["--json", "--watch"]])
def test_to_a_program_the_error_is_json_as_well(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "running", cannot_list)
    done = CliRunner().invoke(app, ["status", *words])
    assert (done.exit_code, done.stderr) == (1, "")
    assert json.loads(done.stdout) == {"error": "the lanes of this machine cannot be listed: no /proc"}


def test_no_lane_is_one_line_that_says_what_would_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "running", lambda: ())
    done = CliRunner().invoke(app, ["status"], env={"COLUMNS": "300"})
    assert done.exit_code == 0
    (line,) = done.output.splitlines()
    assert "No lane" in line and "MMLANE=lane" in line and "image" in line
    done = CliRunner().invoke(app, ["status", "--json"])
    assert (done.exit_code, done.output) == (0, "[]\n")


# --- through a pipe ---


@contextmanager
def piped(*words: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process whose standard output is a pipe, and which ends with the block."""
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    program = [sys.executable, "-m", "mmlane", *words]
    with subprocess.Popen(
        program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane whose row of missing readers is longer than any terminal is wide."""
    pytest.importorskip("torch")
    from mmlane.lane import Lane

    with Lane({"a group of readers with a long name": 20}, capacity=4 << 20) as lane:
        yield lane


def test_watching_through_a_pipe_writes_each_look_after_a_line_with_the_time(lane: Lane) -> None:
    with piped("status", "--watch") as process:
        assert process.stdout is not None
        times, seen = [], 0
        for line in process.stdout:
            if line.startswith("--- "):
                times.append(datetime.fromisoformat(line.removeprefix("--- ").strip()))
            seen += lane.name in line
            if len(times) == 3:
                break
    assert seen >= 2 and times == sorted(set(times)) and all(time.tzinfo for time in times)


def test_watching_as_json_is_a_line_for_each_look(lane: Lane) -> None:
    with piped("status", "--watch", "--json") as process:
        assert process.stdout is not None
        for _ in range(2):
            found = json.loads(process.stdout.readline())
            (told,) = [one["stats"] for one in found if one["name"] == lane.name]
            assert (told["state"], told["capacity_bytes"]) == ("waiting", 4 << 20)


@pytest.mark.parametrize("words", [["--watch"], ["--watch", "--json"]])
def test_a_reader_that_goes_ends_the_command_quietly(words: list[str], lane: Lane) -> None:
    with piped("status", *words) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(DEADLINE) == 0
        assert process.stderr.read() == ""


def test_a_closed_output_is_no_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    program = [sys.executable, "-m", "mmlane", "status"]
    done = subprocess.run(program, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_line_is_wrapped_in_a_pipe(lane: Lane) -> None:
    with piped("status") as process:
        text, _ = process.communicate(timeout=DEADLINE)
    missing = ", ".join(f"{number} of 'a group of readers with a long name'" for number in range(20))
    assert f"waiting for readers: {missing}" in text
    assert not [line for line in text.splitlines() if line.endswith(" ")]


@pytest.mark.parametrize(("columns", "width"), [(None, 100_000), ("60", 60)])
def test_output_to_a_pipe_has_the_width_of_the_variable_columns(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert console().width == width


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
    assert (
        done.exit_code == 1 and f"mmlane: lane {NAME} does not tell its status: no process listens" in done.output
    )
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
