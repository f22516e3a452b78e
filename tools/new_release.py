"""`python -m tools.new_release`: published engine releases that the table does not have, as a list in JSON.

With `--issue V REPORT` it opens an issue on that release, unless there is one, open or closed; it uses `gh`.
REPORT is a file with what `make matrix-new V=...` wrote. A scheduled workflow calls both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from mmlane.compat import Matrix, matrix
from tools.matrix_new import unknown_releases

_TAIL = 60_000  # characters; the forge takes 65,536 in an issue

BODY = """\
sglang {version} is published, and `compat_matrix.yaml` does not have it. mmlane treats it like the release before,
checks the signatures of what it patches, and reports it as untested.

{verdict} What to do is in CONTRIBUTING.md, "Add an engine release".

`make matrix-new V={version}` says:

```text
{report}
```
"""


def title(version: Version) -> str:
    """The title of the issue on a release, by which it is found again."""
    return f"sglang {version}: review the cells of the table"


def verdict(report: str) -> str:
    """A sentence on what a report of `make matrix-new` asks for."""
    lines = report.splitlines()
    named = next((line for line in lines if line.startswith("a person has to look at: ")), None)
    if named is not None:
        return f"Cells to review: {named.partition(': ')[2]}."
    if "nothing needs a person" in lines:
        return "No cell needs a review; the release has to be added to the table and tested."
    return "The report is not complete, so every cell has to be reviewed."


def body(version: Version, report: str) -> str:
    """The text of the issue. Of a report that is too long, the end is in it."""
    return BODY.format(version=version, verdict=verdict(report), report=report.strip()[-_TAIL:])


def open_issue(version: Version, report: str) -> str:
    """Open the issue on a release unless there is one; say which. Raises CalledProcessError where `gh` fails."""
    wanted = title(version)
    search = f'"sglang {version}" in:title'
    listed = _gh("issue", "list", "--state", "all", "--search", search, "--json", "title,url")
    for issue in json.loads(listed):
        if issue["title"] == wanted:
            return f"{wanted}: there is an issue: {issue['url']}"
    created = _gh("issue", "create", "--title", wanted, "--body-file", "-", given=body(version, report))
    return f"{wanted}: opened {created.strip()}"


def _gh(*words: str, given: str = "") -> str:
    done = subprocess.run(["gh", *words], input=given, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.new_release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, help="another file in the form of compat_matrix.yaml")
    parser.add_argument("--issue", nargs=2, metavar=("V", "REPORT"), help="open the issue on a release")
    options = parser.parse_args(arguments)
    if options.issue:
        version, report = options.issue
        print(open_issue(Version(version), Path(report).read_text(encoding="utf-8")))
        return 0
    known = Matrix.load(options.table) if options.table else matrix()
    try:
        print(json.dumps([str(version) for version in unknown_releases(known)]))
    except LookupError as silence:
        raise SystemExit(str(silence)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
