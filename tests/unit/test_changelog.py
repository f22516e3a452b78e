"""Entries in changelog.d become a section of CHANGELOG.md, and none is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mmlane import __version__
from tools import changelog

pytest.importorskip("towncrier", reason="not among what the tests need on every Python")

BEFORE = """# Changelog

<!-- releases -->

"""
RELEASED = """## [0.0.9] - 2026-01-02

### Added

- Something.
"""
UNRELEASED = """## [Unreleased] - 0.1.0

### Added

- One entry,
  in two lines.

### Fixed

- A fault.

"""


@pytest.fixture
def tree(tmp_path: Path, checkout: Path) -> Path:
    """A checkout without entries, and with a changelog that has one release."""
    shutil.copytree(checkout / "changelog.d", tmp_path / "changelog.d")
    for entry in (tmp_path / "changelog.d").glob("*.md"):
        entry.unlink()
    shutil.copy(checkout / "pyproject.toml", tmp_path)
    (tmp_path / "plugin" / "mmlane").mkdir(parents=True)
    shutil.copy(checkout / "plugin" / "mmlane" / "__init__.py", tmp_path / "plugin" / "mmlane")
    (tmp_path / changelog.CHANGELOG).write_text(BEFORE + RELEASED)
    return tmp_path


def entry(tree: Path, name: str, text: str) -> None:
    (tree / "changelog.d" / name).write_text(text)


def released(tree: Path) -> str:
    """The changelog after a release, with the same day in it every time."""
    assert changelog.main([], tree) == 0
    assert not list((tree / "changelog.d").glob("*.md"))
    text = (tree / changelog.CHANGELOG).read_text()
    return re.sub(rf"^(## \[{re.escape(__version__)}\] - )\d{{4}}-\d\d-\d\d$", r"\1DAY", text, flags=re.MULTILINE)


def test_entries_become_a_section_of_the_version(tree: Path) -> None:
    entry(tree, "+new.added.md", "Something `new`, in\ntwo lines.\n")
    entry(tree, "12.fixed.md", "A fault.\n")
    entry(tree, "+old.removed.md", "Something old.\n")
    entry(tree, "+other.changed.md", "Something else.\n")
    section = f"""## [{__version__}] - DAY

### Added

- Something `new`, in
  two lines.

### Changed

- Something else.

### Fixed

- A fault. (#12)

### Removed

- Something old.

"""
    assert released(tree) == BEFORE + section + RELEASED


def test_what_was_written_by_hand_comes_first(tree: Path) -> None:
    (tree / changelog.CHANGELOG).write_text(BEFORE + UNRELEASED + RELEASED)
    entry(tree, "+new.added.md", "Something new.\n")
    entry(tree, "+old.changed.md", "Something else.\n")
    section = f"""## [{__version__}] - DAY

### Added

- One entry,
  in two lines.
- Something new.

### Changed

- Something else.

### Fixed

- A fault.

"""
    assert released(tree) == BEFORE + section + RELEASED


def test_the_section_of_the_version(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=rf"CHANGELOG.md has no section of {re.escape(__version__)}"):
        changelog.main(["--section"], tree)
    entry(tree, "+new.added.md", "Something new.\n")
    released(tree)
    capsys.readouterr()
    assert changelog.main(["--section"], tree) == 0
    assert capsys.readouterr().out == "### Added\n\n- Something new.\n"


def test_no_entry_of_the_checkout_is_lost(tree: Path, checkout: Path) -> None:
    text = (checkout / changelog.CHANGELOG).read_text()
    (tree / changelog.CHANGELOG).write_text(text)
    entry(tree, "+new.added.md", "Something new.\n")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    after = released(tree).splitlines()
    assert [line for line in lines if line not in after] == []
    assert len(after) >= len(lines) + 1


def test_text_that_would_be_lost_stops_it(tree: Path) -> None:
    with pytest.raises(LookupError, match=r"wanted `### ` below '## \[Unreleased\] - 0\.1\.0', found other"):
        changelog.merged(BEFORE + RELEASED + UNRELEASED.replace("### Added\n\n", ""))
    with pytest.raises(LookupError, match="has no section of a release above"):
        changelog.merged(BEFORE + UNRELEASED + RELEASED)


def test_an_entry_of_no_known_kind_is_refused(tree: Path) -> None:
    entry(tree, "+new.improved.md", "Something new.\n")
    assert changelog.main([], tree) != 0
    assert (tree / changelog.CHANGELOG).read_text() == BEFORE + RELEASED
