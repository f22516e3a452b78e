"""`python -m tools.changelog`: moves the entries in changelog.d to CHANGELOG.md, as the section of a new release.

towncrier does it, and takes the version from the package. Entries that were written into CHANGELOG.md itself,
under `## [Unreleased]`, become part of the new section, before the others. With `--section` it prints the section
of the version that the package has, and changes nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from mmlane import __version__

CHECKOUT = Path(__file__).resolve().parent.parent
CHANGELOG = "CHANGELOG.md"
UNRELEASED = "[Unreleased]"


def merged(text: str) -> str:
    """The changelog without a section `[Unreleased]`: its entries are in the one above, the first of their kind.

    Raises LookupError where there is no section above, and for text that is under no heading.
    """
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    found = [number for number, section in enumerate(sections) if section.startswith(f"## {UNRELEASED}")]
    if not found:
        return text
    (number,) = found
    if number == 0:
        raise LookupError(f"{CHANGELOG} has no section of a release above {UNRELEASED}")
    above, unreleased = sections[number - 1 : number + 1]
    title = above.splitlines()[0]
    entries = _entries(unreleased)
    for kind, lines in _entries(above).items():
        entries[kind] = "\n".join([*([entries[kind]] if kind in entries else []), lines])
    parts = [title, *(f"### {kind}\n\n{lines}" for kind, lines in sorted(entries.items()))]
    sections[number - 1 : number + 1] = ["\n\n".join(parts) + "\n\n"]
    return (head + "".join(sections)).rstrip("\n") + "\n"


def _entries(section: str) -> dict[str, str]:
    """The lines under each heading of a section. Raises LookupError for text under none, which would be lost."""
    first, *kinds = re.split(r"^### ", section, flags=re.MULTILINE)
    if len(first.strip().splitlines()) > 1:
        raise LookupError(f"wanted `### ` below {first.splitlines()[0]!r}, found other text")
    split = [kind.partition("\n") for kind in kinds]
    return {title.strip(): lines.strip("\n") for title, _, lines in split}


def section(text: str, version: str) -> str:
    """The entries of one version. Raises LookupError where the changelog has none."""
    found = re.search(rf"^## \[{re.escape(version)}\] [^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{CHANGELOG} has no section of {version}")
    return found.group(1).strip() + "\n"


def main(arguments: list[str] | None = None, checkout: Path = CHECKOUT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.changelog", description=__doc__)
    parser.add_argument("--section", action="store_true", help="print the section of the package's version")
    path = checkout / CHANGELOG
    if parser.parse_args(arguments).section:
        try:
            print(section(path.read_text(encoding="utf-8"), __version__), end="")
        except LookupError as error:
            raise SystemExit(str(error)) from None
        return 0
    done = subprocess.run([sys.executable, "-m", "towncrier", "build", "--yes"], cwd=checkout, check=False)
    if done.returncode == 0:
        path.write_text(merged(path.read_text(encoding="utf-8")), encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
