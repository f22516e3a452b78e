"""docs/settings.md says what `mmlane.settings` and `mmlane.flags` say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlane.flags import FLAGS
from mmlane.settings import OF_FIELD, VARIABLES, SettingsError, read
from tools import settings_table


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_table.main(["--check"]) == 0, capsys.readouterr().err


def test_every_variable_and_flag_is_in_the_table() -> None:
    rows = [line for line in settings_table.table().splitlines() if line.startswith("| [`")]
    assert [row.split("`")[1] for row in rows] == list(VARIABLES)
    for flag in FLAGS:
        (row,) = [row for row in rows if f"[`{flag.variable}`]" in row]
        assert f"`{flag.name}`" in row


def test_values_that_the_page_explains_are_accepted_and_no_others() -> None:
    for field, text in settings_table.texts().items():
        variable = OF_FIELD[field]
        for value in text.of_value:
            read({variable: value})
        if field not in ("disable", "capacity", "pinned"):
            with pytest.raises(SettingsError) as refused:
                read({variable: "nonsense"})
            right = str(refused.value).partition(" is not one of: ")[2].split(", ")
            assert sorted(text.of_value) == sorted(right)
            assert text.values == ", ".join(f"`{value}`" for value in right)


def test_a_stale_page_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "settings.md"
    page.write_text(f"before\n{settings_table.START}\nyesterday's\n{settings_table.END}\nafter\n")
    assert settings_table.main(["--check"], page) == 1
    assert "is stale" in capsys.readouterr().err and "yesterday's" in page.read_text()
    assert settings_table.main([], page) == 0
    assert settings_table.table() in page.read_text() and "yesterday's" not in page.read_text()
    assert settings_table.main(["--check"], page) == 0


@pytest.mark.parametrize("text", ["no place\n", f"{settings_table.END}\n{settings_table.START}\n"])
def test_a_page_without_a_place_for_it(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "settings.md"
    page.write_text(text)
    assert settings_table.main([], page) == 1
    assert "wanted one <!-- settings-table:start -->" in capsys.readouterr().err
