"""Runs parts of a test suite, each in a pytest of its own, and keeps each result under what it was made from.

A result is found again as long as the files of the checkout that decide it, and the engines' wheels, are the same.
`tools.matrix` says which pieces there are.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from devkit.cache import digest
from devkit.server import dies_with_us
from devkit.wheels import wheel_digest

COUNTS = ("passed", "failed", "errors", "skipped", "xfailed")
# Jobs in the background of a shell ignore Ctrl-C, and so would what they start.
_INTERRUPTIBLE = ("env", "--default-signal=INT")
_GRACE_S = 60.0  # for the fixtures of a run that is ended, which stop servers


@dataclass(frozen=True)
class Piece:
    """`arguments` are pytest's. `files` of the checkout (git's pathspecs) and wheels of `releases` decide it.

    writes: files of the checkout that its tests write. A result holds as long as they are as it left them.
    """

    name: str
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    releases: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def key(self, tree: Path) -> str:
        """A hash of all that decides the result.

        Raises InstallError where a wheel cannot be had, FileNotFoundError for a file, and OSError where git fails.
        """
        for name in self.files:
            if not name.startswith(":") and not (tree / name).exists():
                raise FileNotFoundError(f"{tree / name}: listed as deciding a result, and not there")
        wheels = [wheel_digest(release) for release in self.releases]
        form = ",".join(Result.__dataclass_fields__)  # one kept in another form is not read
        python = f"{platform.python_implementation()} {platform.python_version()}"  # `run` has it run pytest
        return digest(form, python, self.name, *self.arguments, tree_digest(tree, self.files), *wheels)

    def wrote(self, tree: Path) -> str:
        """A hash of what its tests have written."""
        return tree_digest(tree, self.writes) if self.writes else ""


@dataclass(frozen=True)
class Result:
    """outcome: `pass`, `fail`, or why there is neither. The counts are pytest's; reasons: of its skips."""

    outcome: str
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    xfailed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    minutes: float = 0.0
    log: str = ""
    when: str = ""
    note: str = ""
    wrote: str = ""


def tree_digest(tree: Path, files: Sequence[str]) -> str:
    """A hash of the content of these files of a checkout, as they are now: committed or not.

    Raises OSError where git does not list them.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *files]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"`git ls-files` failed in {tree}: {done.stderr.strip()}")
    parts: list[str | bytes] = []
    for name in sorted(set(done.stdout.split("\0")) - {""}):
        path = tree / name
        if path.is_file():  # git still lists what was deleted and not committed
            parts += [name, path.read_bytes(), str(os.access(path, os.X_OK))]
    return digest(*parts)


class Results:
    """Those kept in a directory, with the log of each beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def log(self, piece: Piece, key: str) -> Path:
        return self.directory / f"{piece.name}-{key}.log"

    def passed(self, piece: Piece, key: str, tree: Path) -> Result | None:
        """The result of a run that passed, and that still holds."""
        path = self._path(piece, key)
        if not path.is_file():
            return None
        result = Result(**json.loads(path.read_text()))
        return result if result.outcome == "pass" and result.wrote == piece.wrote(tree) else None

    def keep(self, piece: Piece, key: str, result: Result) -> None:
        beside = self._path(piece, key).with_suffix(".part")
        beside.write_text(json.dumps(asdict(result), indent=1) + "\n")
        beside.replace(self._path(piece, key))

    def _path(self, piece: Piece, key: str) -> Path:
        return self.directory / f"{piece.name}-{key}.json"


def run(piece: Piece, tree: Path, log: Path, limit_s: float) -> Result:
    """Run a piece to its end, or to its time limit; on KeyboardInterrupt its pytest is ended first."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", *piece.arguments, f"--junit-xml={report}"]
    began = time.monotonic()
    outcome = ""
    with log.open("wb") as written:
        process = subprocess.Popen(
            [*dies_with_us(), *_INTERRUPTIBLE, *pytest],
            cwd=tree,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            outcome = "time limit"
        finally:
            _end(process)
    result = read_report(report)
    return replace(
        result or Result(""),
        outcome=outcome or _outcome(result, process.returncode),
        minutes=(time.monotonic() - began) / 60,
        log=str(log),
        when=time.strftime("%Y-%m-%d %H:%M"),
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a pytest as Ctrl-C does, so that its fixtures stop what they have started; then by force."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        pass  # it gets no more time
    finally:
        with suppress(ProcessLookupError):  # its group, which is empty if all went well
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(result: Result | None, status: int) -> str:
    if result is None:
        return f"no report, exit status {status}"
    if status not in (0, 5):  # 5: no tests were collected
        return "fail"
    return "pass" if result.passed else "nothing passed"


def read_report(report: Path) -> Result | None:
    """The counts in a report of pytest's, in JUnit's form; None without a whole report."""
    try:
        # One without a name is a test that was interrupted.
        cases = [case for case in ElementTree.parse(report).iter("testcase") if case.get("name")]
    except (FileNotFoundError, ElementTree.ParseError):
        return None
    found: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in cases:
        kinds = {_kind(child) for child in case} & set(COUNTS)
        found.update(kinds or {"passed"})
        reasons.update(child.get("message", "") for child in case if _kind(child) == "skipped")
    counts: dict[str, Any] = {count: found[count] for count in COUNTS}
    return Result("", **counts, reasons=dict(reasons.most_common()))


def _kind(element: ElementTree.Element) -> str:
    if element.tag == "skipped" and element.get("type") == "pytest.xfail":
        return "xfailed"
    return {"failure": "failed", "error": "errors"}.get(element.tag, element.tag)
