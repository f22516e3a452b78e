"""A published engine release that the table does not have becomes an issue, once. `gh` is a program of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmlane.compat import matrix
from tools import matrix_new, new_release
from tools.releases import published

GH = f"""#!{sys.executable}
import json, pathlib, sys
kept = pathlib.Path(__file__).with_name("issues.json")
issues = json.loads(kept.read_text())
match sys.argv[1:]:
    case ["issue", "list", "--state", "all", "--search", search, "--json", "title,url"]:
        words, _, place = search.rpartition(" ")
        assert place == "in:title"
        found = [issue for issue in issues if words.strip('"') in issue["title"]]
        print(json.dumps([{{key: issue[key] for key in ("title", "url")}} for issue in found]))
    case ["issue", "create", "--title", title, "--body-file", "-"]:
        url = f"https://forge.example/issues/{{len(issues) + 1}}"
        kept.write_text(json.dumps([*issues, {{"title": title, "url": url, "body": sys.stdin.read()}}]))
        print(url)
    case other:
        sys.exit(f"unknown: {{other}}")
"""


@pytest.fixture
def issues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the issues; one of them is on another release."""
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin" / "gh"
    gh.write_text(GH)
    gh.chmod(0o755)
    monkeypatch.setenv("PATH", str(gh.parent))
    kept = tmp_path / "bin" / "issues.json"
    other = f"sglang {matrix().newest}.post1: review the cells of the table"
    kept.write_text(json.dumps([{"title": other, "url": "https://forge.example/issues/1", "body": ""}]))
    return kept


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The table without its newest release."""
    raw = yaml.safe_load(Path(matrix_new.__file__).parents[1].joinpath("compat_matrix.yaml").read_text())
    del raw["engines"][-1]
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_what_is_published_and_not_in_the_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        newest = [str(version) for version in published() if version > matrix().newest]
    except LookupError as silence:
        pytest.skip(str(silence))
    assert new_release.main([]) == 0
    assert json.loads(capsys.readouterr().out) == newest
    assert new_release.main(["--table", str(table)]) == 0
    assert json.loads(capsys.readouterr().out) == [str(matrix().newest), *newest]


def test_an_issue_is_opened_once(
    issues: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = str(matrix().newest)
    matrix_new.main([newest, "--table", str(table)])
    report = tmp_path / "report.txt"
    report.write_text(capsys.readouterr().out)
    assert new_release.main(["--issue", newest, str(report)]) == 0
    assert "opened https://forge.example/issues/2" in capsys.readouterr().out
    assert new_release.main(["--issue", newest, str(report)]) == 0
    assert "there is an issue: https://forge.example/issues/2" in capsys.readouterr().out
    _, issue = json.loads(issues.read_text())
    assert issue["title"] == f"sglang {newest}: review the cells of the table"
    assert f"sglang {newest}: not in the table; compared with " in issue["body"]


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ("x\na person has to look at: lane, fan_out\ny", "Cells to review: lane, fan_out."),
        (
            "x\nnothing needs a person\n",
            "No cell needs a review; the release has to be added to the table and tested.",
        ),
        ("Traceback\n", "The report is not complete, so every cell has to be reviewed."),
    ],
)
def test_what_the_issue_asks_for(report: str, sentence: str) -> None:
    assert new_release.verdict(report) == sentence
    assert sentence in new_release.body(matrix().newest, report)


def test_a_report_that_is_too_long(issues: Path) -> None:
    text = new_release.body(matrix().newest, "first line\n" + "x" * 70_000 + "\nnothing needs a person")
    assert len(text) < 65_536 and "first line" not in text
    assert text.endswith("nothing needs a person\n```\n")


def test_a_forge_that_fails_is_an_error(issues: Path) -> None:
    issues.write_text("")
    with pytest.raises(subprocess.CalledProcessError):
        new_release.open_issue(matrix().newest, "")
