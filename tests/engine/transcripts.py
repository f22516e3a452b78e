"""What releases do without the plugin: seen once for each wheel, and kept as text in transcripts/VERSION.yaml.

    @scenario()
    def plain(version: str) -> Any: ...         # starts the release and returns what it did, as JSON values

    transcripts.of("0.5.9", plain)["answers"]   # in a test, by the fixture of that name

A transcript holds for one wheel of the engine, one devkit and one scenario; one that was made with another is
refused. With `--transcripts anew` each is made again when a test first asks for it, and written.
test_transcripts.py then compares it with what git has: a change is an error until a person has committed it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from devkit.cache import digest
from devkit.wheels import wheel_digest
from mmlane.compat import matrix

HERE = Path(__file__).parent
DIRECTORY = HERE / "transcripts"
DEVKIT = HERE.parents[1] / "devkit"
# Parts of the devkit that start no engine for a test.
_OTHERS = {"__main__.py", "container.py", "demo.py", "nodes.py"}
# What every scenario does is said here, too.
_COMMON = (
    "asking.py", "faults.py", "forks.py", "watching.py", "probes/probe_digests.py", "probes/sitecustomize.py",
    "probes/when_imported.py", "probes/when_made.py",
)  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NEAR = 1e-4  # two floating-point numbers are the same number if they differ by no more


class Refused(AssertionError):
    """There is no transcript for this wheel, devkit and scenario."""


@dataclass(frozen=True)
class Scenario:
    """Something that is done to unpatched releases. `sources`: the files that say what is done."""

    run: Callable[[str], Any]
    sources: tuple[Path, ...]
    is_for: Callable[[str], bool]

    @property
    def name(self) -> str:
        return self.run.__name__

    def key(self, version: str) -> dict[str, str]:
        """What a transcript of it holds for."""
        return {
            "wheel": wheel_digest(version),
            "devkit": digest_of(_devkit()),
            "scenario": digest_of([*self.sources, *(HERE / name for name in _COMMON)]),
        }


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *sources: str, on: Sequence[str] | Callable[[Version], bool] | None = None
) -> Callable[[Callable[[str], Any]], Scenario]:
    """Makes a scenario of a function that takes a release and returns what that did.

    What is done is said by the function's own file, and by these files of tests/engine. on: the releases it is
    for, by name (`newest` is the table's) or by a condition; all if it is None.
    """

    def is_for(version: str) -> bool:
        if on is None or callable(on):
            return on is None or on(Version(version))
        return version in on or ("newest" in on and Version(version) == matrix().newest)

    def make(function: Callable[[str], Any]) -> Scenario:
        own = Path(function.__code__.co_filename)
        made = Scenario(function, (own, *(HERE / name for name in sources)), is_for)
        SCENARIOS[made.name] = made
        return made

    return make


def _devkit() -> list[Path]:
    code = (file for file in sorted(DEVKIT.rglob("*.py")) if file.name not in _OTHERS)
    return [*code, DEVKIT / "requirements.txt"]


def digest_of(files: Sequence[Path]) -> str:
    """Of what files do: lines of comments and docstrings do nothing."""
    return digest(*(part for file in files for part in (file.name, _said(file))))


def _said(file: Path) -> str:
    """By lines, not by tokens or syntax trees: these differ from one Python to the next."""
    text = file.read_text()
    documents = _lines_of_docstrings(text) if file.suffix == ".py" else set()
    lines = (line.rstrip() for number, line in enumerate(text.splitlines(), 1) if number not in documents)
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


def _lines_of_docstrings(code: str) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        for statement in getattr(node, "body", [])[:1] if isinstance(node, _DOCUMENTED) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return found


@dataclass
class Transcripts:
    """The transcripts of all releases. anew: run the releases, instead of believing what is written."""

    anew: bool = False
    directory: Path = DIRECTORY
    _seen: dict[tuple[str, str], Any] = field(default_factory=dict)

    def of(self, version: str, scenario: Scenario) -> Any:
        """What a release does in a scenario. Raises `Refused` if what is written is out of date, or not there."""
        place = (version, scenario.name)
        if place not in self._seen:
            self._seen[place] = self._made(version, scenario) if self.anew else self._believed(version, scenario)
        seen = self._seen[place]
        if isinstance(seen, Exception):
            raise seen
        return seen

    def change(self, version: str, scenario: Scenario) -> str | None:
        """How that differs from what git has; None if it does not, or git has nothing of it."""
        committed = self._parsed(self._committed(version)).get(scenario.name)
        if committed is None:
            return None
        return next(differences(committed["seen"], self.of(version, scenario)), None)

    def _made(self, version: str, scenario: Scenario) -> Any:
        try:
            seen = json.loads(json.dumps(scenario.run(version)))
        except Exception as error:  # noqa: BLE001 - each test that asks for it fails with it, without another run
            return error
        found = self._parsed(self._written(version))
        key = scenario.key(version)
        before = found.get(scenario.name, {})
        if {name: before.get(name) for name in key} != key or next(differences(before["seen"], seen), None):
            found[scenario.name] = {**key, "processor": processor(), "seen": seen}
            self._write(version, found)
        return seen

    def _believed(self, version: str, scenario: Scenario) -> Any:
        written = self._parsed(self._written(version)).get(scenario.name)
        what, remedy = f"of {scenario.name} on {version}", f"run: make transcripts ONLY={version}"
        if written is None:
            raise Refused(f"no transcript {what}; {remedy}")
        for part, wanted in scenario.key(version).items():
            if written.get(part) != wanted:
                found = written.get(part)
                raise Refused(
                    f"the transcript {what} was made with another {part} ({found}, here {wanted}); {remedy}"
                )
        return written["seen"]

    def _file(self, version: str) -> Path:
        return self.directory / f"{version}.yaml"

    def _written(self, version: str) -> str:
        file = self._file(version)
        return file.read_text() if file.exists() else ""

    def _committed(self, version: str) -> str:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{version}.yaml"],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        return shown.stdout if shown.returncode == 0 else ""

    @staticmethod
    def _parsed(text: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(text) or {}
        return found

    def _write(self, version: str, content: dict[str, Any]) -> None:
        head = f"# What sglang {version} does without mmlane; written by `make transcripts` (../transcripts.py).\n"
        text = yaml.safe_dump(dict(sorted(content.items())), default_flow_style=None, sort_keys=False, width=115)
        beside = self._file(version).with_suffix(f".{os.getpid()}")  # a process killed here leaves no half
        beside.write_text(head + text)
        beside.replace(self._file(version))


def processor() -> str:
    """Its name: another one may round otherwise."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown"


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, and how."""
    if isinstance(before, Mapping) and isinstance(after, Mapping) and before.keys() == after.keys():
        for name in before:
            yield from differences(before[name], after[name], f"{where}/{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, where=f"{where}/{number}")
    elif isinstance(before, float) and isinstance(after, float):
        if abs(before - after) > NEAR:
            yield f"{where}: {before} before, {after} now"
    elif type(before) is not type(after) or before != after:
        yield f"{where}: {before} before, {after} now"
