"""Settings: variables, and how a wrong value is refused."""

from __future__ import annotations

import pytest

from mmlane.settings import (
    PINNED,
    VARIABLES,
    Settings,
    SettingsError,
    misspelt,
    read,
    renamed,
)


def test_defaults() -> None:
    assert read({}) == Settings(mode="lane", disable=frozenset(), strict=False, log="info")


def test_every_variable() -> None:
    environ = {
        "MMLANE": "Backport",
        "MMLANE_DISABLE": "fan_out, tp_barrier,",
        "MMLANE_STRICT": "1",
        "MMLANE_LOG": "debug",
    }
    assert read(environ) == Settings("backport", frozenset({"fan_out", "tp_barrier"}), True, "debug")


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("MMLANE", "on", "lane, backport, off"),
        ("MMLANE_STRICT", "yes", "0, 1"),
        ("MMLANE_LOG", "loud", "debug, info, warning"),
    ],
)
def test_a_wrong_value_is_refused_with_the_right_ones(variable: str, value: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable}={value} is not one of: {right}"):
        read({variable: value})


def test_a_capacity_is_a_number_of_mib() -> None:
    assert read({"MMLANE_CAPACITY_MB": " 64 "}).capacity == 64 << 20
    assert read({"MMLANE_CAPACITY_MB": ""}).capacity is None


@pytest.mark.parametrize("value", ["0", "-1", "64M", "1.5", "much", "9" * 5000])
def test_a_wrong_capacity_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=f"MMLANE_CAPACITY_MB={value} is not a number of MiB"):
        read({"MMLANE_CAPACITY_MB": value})


def test_pinned_memory_can_be_none_at_all() -> None:
    assert read({"MMLANE_PINNED_MB": "64"}).pinned == 64 << 20
    assert read({"MMLANE_PINNED_MB": "0"}).pinned == 0 and read({}).pinned is None
    with pytest.raises(SettingsError, match="MMLANE_PINNED_MB=no is not a number of MiB"):
        read({"MMLANE_PINNED_MB": "no"})


def test_pinned_memory_is_shared_by_tokenizer_workers_unless_it_was_asked_for() -> None:
    """What the user says holds for each of them."""
    assert [read({}).pinned_of_one(workers) for workers in (0, 1, 4)] == [PINNED, PINNED, PINNED // 4]
    asked = read({"MMLANE_PINNED_MB": "64"})
    assert [asked.pinned_of_one(workers) for workers in (0, 1, 4)] == [64 << 20] * 3
    assert read({"MMLANE_PINNED_MB": "0"}).pinned_of_one(1) == 0


def test_unknown_variables_are_named_with_the_nearest_known_one() -> None:
    known = dict.fromkeys((*VARIABLES, "MMLANE_IPC_LOCK", "MMLANE_CACHE", "OTHER_MMLANE_X"), "")
    assert read(known).unknown == ()
    unknown = read({"MMLANE_CAPACITY": "1", "MMLANE_ZZZ": "1", **known}).unknown
    assert unknown == ("MMLANE_CAPACITY", "MMLANE_ZZZ")
    assert misspelt(unknown) == (
        "unknown variables, which do nothing: MMLANE_CAPACITY (did you mean MMLANE_CAPACITY_MB?), MMLANE_ZZZ"
    )
    assert "MMLANE_LOG_LEVEL (did you mean MMLANE_LOG?)" in misspelt(["MMLANE_LOG_LEVEL"])
    assert "MMLANE_PINNED (did you mean MMLANE_PINNED_MB?)" in misspelt(["MMLANE_PINNED"])
    assert "MMLANE_MODE (did you mean MMLANE?)" in misspelt(["MMLANE_MODE"])


def test_former_names_are_accepted_with_a_line() -> None:
    chosen = read({"MMLANE": "Arena", "MMLANE_DISABLE": "fan_out,arena"}, {"MMLANE_DISABLE": "--mmlane-disable "})
    assert chosen.mode == "lane" and chosen.disable == {"fan_out", "lane"}
    assert chosen.former == ("MMLANE=arena", "--mmlane-disable arena")
    former = "arena"
    assert renamed(chosen.former) == (
        f"MMLANE={former}, --mmlane-disable {former}: {former} is called lane now, and the former name is accepted"
        " until 0.2.0 only"
    )
    assert read({"MMLANE": "lane", "MMLANE_DISABLE": "lane"}).former == ()
