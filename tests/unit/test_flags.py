"""Flags: taken off the command line and out of the config file, and how a wrong one is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmlane.flags import flags_in_config, take_flags
from mmlane.settings import Settings, SettingsError, read


def test_flags_are_taken_off_and_carried_as_variables() -> None:
    argv = [
        "launch",
        "--tp",
        "2",
        "--mmlane",
        "backport",
        "--mmlane-disable=fan_out",
        "--mmlane-strict",
        "--port",
        "1",
    ]
    environ = {"MMLANE": "off"}
    typed = take_flags(argv, environ)
    assert argv == ["launch", "--tp", "2", "--port", "1"]
    assert typed == {
        "MMLANE": "--mmlane ",
        "MMLANE_DISABLE": "--mmlane-disable=",
        "MMLANE_STRICT": "--mmlane-strict",
    }
    assert environ == {"MMLANE": "backport", "MMLANE_DISABLE": "fan_out", "MMLANE_STRICT": "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mmlane", "bogus"], "--mmlane bogus is not one of: lane, backport, off"),
        (["--mmlane=bogus"], "--mmlane=bogus is not one of: lane, backport, off"),
        (["--mmlane"], "--mmlane needs a value: {lane,backport,off}"),
        (["--mmlane", "--tp"], "--mmlane needs a value: {lane,backport,off}"),
        (["--mmlane="], "--mmlane needs a value: {lane,backport,off}"),
        (["--mmlane", ""], "--mmlane needs a value: {lane,backport,off}"),
        (["--mmlane", " "], "--mmlane needs a value: {lane,backport,off}"),
        (["--mmlane-disable", ","], "--mmlane-disable needs a value: ID[,ID...]"),
        (["--mmlane-disable="], "--mmlane-disable needs a value: ID[,ID...]"),
        (["--mmlane-strict=1"], "--mmlane-strict takes no value, got '1'"),
    ],
)
def test_a_wrong_flag_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        take_flags(["launch", *words], {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--mmlane-dis", " (did you mean --mmlane-disable?)"),
        ("--mmlane_disable", " (did you mean --mmlane-disable?)"),
        ("--mmlane-mode", " (did you mean --mmlane?)"),
        ("--mmlane-strct=1", " (did you mean --mmlane-strict?)"),
        ("--mmlane-log", " (did you mean the variable MMLANE_LOG?)"),
        ("--mmlane-zzz", ""),
    ],
)
def test_a_flag_that_there_is_not_is_refused_with_the_nearest_that_there_is(flag: str, meant: str) -> None:
    with pytest.raises(SettingsError) as caught:
        take_flags(["launch", flag, "off"], {})
    name = flag.partition("=")[0]
    assert str(caught.value) == f"{name} is not one of: --mmlane, --mmlane-disable, --mmlane-strict{meant}"


def test_a_wrong_variable_is_named_as_such_beside_right_flags() -> None:
    with pytest.raises(SettingsError, match=r"^MMLANE_LOG=loud is not one of"):
        take_flags(["launch", "--mmlane", "off"], {"MMLANE_LOG": "loud"})


def test_repeated_flags_of_a_list_add_up_in_order() -> None:
    environ = {"MMLANE_DISABLE": "lane"}  # a flag still takes the place of its variable
    take_flags(
        ["launch", "--mmlane-disable", "tp_barrier,fan_out", "--mmlane-disable= ipc_lock ,fan_out,"], environ
    )
    assert environ == {"MMLANE_DISABLE": "tp_barrier,fan_out,ipc_lock"}


def test_a_repeated_flag_says_the_same_thing_or_is_refused() -> None:
    environ: dict[str, str] = {}
    take_flags(["launch", "--mmlane", "off", "--mmlane-strict", "--mmlane=Off", "--mmlane-strict"], environ)
    assert read(environ) == Settings("off", strict=True)
    with pytest.raises(SettingsError) as caught:
        take_flags(["launch", "--mmlane", "off", "--mmlane=lane"], {})
    assert str(caught.value) == "--mmlane off and --mmlane=lane contradict each other; give one of them"


# --- flags in the engine's config file ---


def config(path: Path, text: str) -> list[str]:
    """A command line that names a config file of that text."""
    file = path / "launch.yaml"
    file.write_text(text)
    return ["launch", "--tp", "2", "--config", str(file)]


def taken(argv: list[str], environ: dict[str, str]) -> dict[str, str]:
    """The variables after flags have been taken from a command line and the file that it names."""
    take_flags(argv, environ, flags_in_config(argv))
    return environ


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("mmlane: backport", {"MMLANE": "backport"}),
        ("mmlane: off", {"MMLANE": "off"}),  # which YAML takes for a truth value
        ("mmlane: 'off'", {"MMLANE": "off"}),
        ("mmlane-disable: fan_out", {"MMLANE_DISABLE": "fan_out"}),
        ("mmlane_disable: fan_out, ipc_lock", {"MMLANE_DISABLE": "fan_out,ipc_lock"}),
        ("mmlane-disable: [fan_out, ipc_lock]", {"MMLANE_DISABLE": "fan_out,ipc_lock"}),
        ("mmlane-disable: fan_out\nmmlane_disable: [ipc_lock]", {"MMLANE_DISABLE": "fan_out,ipc_lock"}),
        ("mmlane-strict: true", {"MMLANE_STRICT": "1"}),
        ("mmlane_strict: no", {"MMLANE_STRICT": "0"}),
        ("mmlane-strict: 1", {"MMLANE_STRICT": "1"}),
        ("common: &c\n  mmlane: backport\n<<: *c", {"MMLANE": "backport"}),
        ("model-path: mmlane", {}),
        ("", {}),
        ("mmlane", {}),
    ],
)
def test_a_config_file_gives_what_the_flags_give(text: str, environ: dict[str, str], tmp_path: Path) -> None:
    argv = config(tmp_path, text)
    words = list(argv)
    assert taken(argv, {}) == environ
    assert argv == words  # the engine reads the file, too


def test_a_flag_wins_over_the_config_file_and_that_over_a_variable(tmp_path: Path) -> None:
    argv = config(tmp_path, "mmlane: backport\nmmlane-strict: false\nmmlane-disable: fan_out")
    environ = {"MMLANE": "lane", "MMLANE_STRICT": "1", "MMLANE_DISABLE": "lane"}
    assert taken(list(argv), dict(environ)) == {
        "MMLANE": "backport",
        "MMLANE_STRICT": "0",
        "MMLANE_DISABLE": "fan_out",
    }
    argv += ["--mmlane", "off", "--mmlane-strict", "--mmlane-disable", "ipc_lock"]
    assert taken(argv, environ) == {"MMLANE": "off", "MMLANE_STRICT": "1", "MMLANE_DISABLE": "ipc_lock"}


def test_a_config_file_behind_an_equals_sign(tmp_path: Path) -> None:
    *_, file = config(tmp_path, "mmlane: backport")
    assert taken(["launch", f"--config={file}"], {}) == {"MMLANE": "backport"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mmlane: foo", ": mmlane: foo is not one of: lane, backport, off"),
        ("mmlane: on", ": mmlane: on is not one of: lane, backport, off"),
        ("mmlane:", ": mmlane needs a value: {lane,backport,off}"),
        ("mmlane-disable: []", ": mmlane-disable needs a value: ID[,ID...]"),
        ("mmlane-strict: maybe", ": mmlane-strict: maybe is not one of: true, false"),
        (
            "mmlane_dis: fan_out",
            ": mmlane_dis is not one of: --mmlane, --mmlane-disable, --mmlane-strict"
            " (did you mean --mmlane-disable?)",
        ),
    ],
)
def test_a_wrong_key_is_refused_with_the_file(text: str, message: str, tmp_path: Path) -> None:
    argv = config(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        taken(argv, {})
    assert str(caught.value) == argv[-1] + message


def test_two_spellings_that_differ_are_refused(tmp_path: Path) -> None:
    argv = config(tmp_path, "mmlane-strict: true\nmmlane_strict: false")
    with pytest.raises(SettingsError) as caught:
        taken(argv, {})
    file = argv[-1]
    assert str(caught.value) == (
        f"{file}: mmlane-strict and {file}: mmlane_strict contradict each other; give one of them"
    )


@pytest.mark.parametrize(
    "text", ["mmlane: [", "- mmlane", "mmlane: 2021-99-99", "mmlane: !!python/name:os.getpid ''"]
)
def test_a_broken_config_file_is_the_engines_to_report(text: str, tmp_path: Path) -> None:
    assert flags_in_config(config(tmp_path, text)) == []


def test_a_config_file_that_the_engine_would_not_read(tmp_path: Path) -> None:
    argv = config(tmp_path, "mmlane: off")
    file = argv[-1]
    (tmp_path / "launch.json").write_text("mmlane: off")
    for words in (
        [],
        ["--config"],
        ["--config", f"{file}.gone.yaml"],
        ["--config", str(tmp_path / "launch.json")],
        ["--config", file, "--config", file],
    ):
        assert flags_in_config(["launch", *words]) == []


def test_a_pipe_is_left_for_the_engine(tmp_path: Path) -> None:
    """It can be read but once."""
    os.mkfifo(tmp_path / "pipe.yaml")
    assert flags_in_config(["launch", "--config", str(tmp_path / "pipe.yaml")]) == []
