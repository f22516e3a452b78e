"""What releases do without the plugin: seen once for each wheel, and kept as text in transcripts/VERSION.yaml.

    @scenario()
    def plain(version: str) -> Any: ...         # starts the release and returns what it did, as JSON values

    transcripts.of("0.5.9", plain)["answers"]   # in a test, by the fixture of that name

A transcript holds for one wheel of the engine, one devkit and one scenario; one that was made with another is
refused. With `--transcripts anew` each is made again when a test first asks for it, and compared.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from devkit.cache import digest
from devkit.wheels import wheel_digest

HERE = Path(__file__).parent
DIRECTORY = HERE / "transcripts"
DEVKIT = HERE.parents[1] / "devkit"
# What decides how a server of the devkit behaves.
SHAPES_THE_ENGINE = (
    "checkpoint.py", "checkpoint_writer.py", "client.py", "cpu_engine", "environment.py", "images.py",
    "requirements.txt", "server.py",
)  # fmt: skip
NEAR = 1e-4  # two floating-point numbers are the same number if they differ by no more


class Refused(AssertionError):
    """There is no transcript for this wheel, devkit and scenario."""


class Changed(AssertionError):
    """Made anew, a transcript says something else."""


@dataclass(frozen=True)
class Scenario:
    """Something that is done to unpatched releases. `sources`: the files that say what is done."""

    run: Callable[[str], Any]
    sources: tuple[Path, ...]
    on: Callable[[Version], bool]

    @property
    def name(self) -> str:
        return self.run.__name__

    def key(self, version: str) -> dict[str, str]:
        """What a transcript of it holds for."""
        devkit = [file for name in SHAPES_THE_ENGINE for file in _files(DEVKIT / name)]
        return {"wheel": wheel_digest(version), "devkit": _digest(devkit), "scenario": _digest(self.sources)}


def scenario(
    *sources: str, on: Callable[[Version], bool] | Collection[str] | None = None
) -> Callable[[Callable[[str], Any]], Scenario]:
    """Makes a scenario of a function that takes a release and returns what that did.

    What is done is said by the function's own file, by asking.py, and by these files of tests/engine. on: the
    releases it is for, by name or by a condition; all if it is None.
    """

    def holds(version: Version) -> bool:
        return on is None or (on(version) if callable(on) else str(version) in on)

    def make(function: Callable[[str], Any]) -> Scenario:
        own = Path(function.__code__.co_filename)
        return Scenario(function, (own, HERE / "asking.py", *(HERE / name for name in sources)), holds)

    return make


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _digest(files: list[Path] | tuple[Path, ...]) -> str:
    """Of what files say; comments and layout of Python code say nothing."""
    return digest(*(part for file in files for part in (file.name, _meaning(file))))


def _meaning(file: Path) -> str | bytes:
    if file.suffix != ".py":
        return file.read_bytes()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@dataclass
class Transcripts:
    """The transcripts of all releases. anew: run the releases, instead of believing what is written."""

    anew: bool = False
    directory: Path = DIRECTORY
    _seen: dict[tuple[str, str], Any] = field(default_factory=dict)

    def of(self, version: str, scenario: Scenario) -> Any:
        """What a release does in a scenario.

        Raises `Refused` if what is written is out of date, and `Changed`, once, if a new run gave something else;
        that has been written then.
        """
        place = (version, scenario.name)
        if place not in self._seen:
            written = self._read(version).get(scenario.name)
            key = scenario.key(version)
            if self.anew:
                self._seen[place] = json.loads(json.dumps(scenario.run(version)))
                self._write(version, {**self._read(version), scenario.name: {**key, "seen": self._seen[place]}})
                if written is not None and (
                    difference := next(differences(written["seen"], self._seen[place]), None)
                ):
                    raise Changed(f"{scenario.name} on {version}: {difference}; it has been written: see git diff")
            else:
                self._seen[place] = self._believed(version, scenario.name, key, written)
        return self._seen[place]

    def _believed(self, version: str, name: str, key: dict[str, str], written: dict[str, Any] | None) -> Any:
        remedy = f"run: make transcripts ONLY={version}"
        if written is None:
            raise Refused(f"no transcript of {name} on {version}; {remedy}")
        for part, wanted in key.items():
            if written.get(part) != wanted:
                raise Refused(
                    f"the transcript of {name} on {version} was made with another {part} "
                    f"({written.get(part)}, here {wanted}); {remedy}"
                )
        return written["seen"]

    def _file(self, version: str) -> Path:
        return self.directory / f"{version}.yaml"

    def _read(self, version: str) -> dict[str, Any]:
        file = self._file(version)
        found: dict[str, Any] = yaml.safe_load(file.read_text()) if file.exists() else {}
        return found

    def _write(self, version: str, content: dict[str, Any]) -> None:
        head = f"# What sglang {version} does without mmlane; written by `make transcripts` (../transcripts.py).\n"
        text = yaml.safe_dump(dict(sorted(content.items())), default_flow_style=None, sort_keys=False, width=115)
        self._file(version).write_text(head + text)


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
