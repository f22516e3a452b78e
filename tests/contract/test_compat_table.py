"""The compatibility tables in the documents are those of compat_matrix.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlane.compat import matrix
from tools import compat_table


def test_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat_table.main(["--check"]) == 0, capsys.readouterr().err


def test_every_release_and_patch_is_in_the_overview() -> None:
    lines = compat_table.overview(matrix()).splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert all(f"`{id}`" in head for id in matrix().rows)
    spans = [row.split("|")[1].split(" – ") for row in rows]  # noqa: RUF001 - a range of versions
    assert spans[0][0].strip() == str(matrix().oldest)
    assert spans[-1][-1].strip() == str(matrix().newest)


def test_a_stale_document_is_named_and_mended(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in compat_table.FILES:
        (tmp_path / name).write_text(f"before\n{compat_table.START}\nold\n{compat_table.END}\nafter\n")
    found = compat_table.stale(tmp_path, matrix())
    assert [str(file.relative_to(tmp_path)) for file in found] == list(compat_table.FILES)
    for file, right in found.items():
        assert right.startswith(f"before\n{compat_table.START}\n| SGLang |")
        assert right.endswith(f"\n{compat_table.END}\nafter\n")
        file.write_text(right, encoding="utf-8")
    assert compat_table.stale(tmp_path, matrix()) == {}


@pytest.mark.parametrize(
    "text", ["no place\n", f"{compat_table.START}\n", f"{compat_table.END}\n{compat_table.START}\n"]
)
def test_a_document_without_a_place_for_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(compat_table.NoMarkers, match=r"^README\.md: wanted one <!-- compat-table:start -->"):
        compat_table.stale(tmp_path, matrix())
