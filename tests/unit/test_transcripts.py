"""Transcripts of unpatched releases: used for the wheel, devkit and scenario that they are of, else refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine import transcripts
from tests.engine.transcripts import DIRECTORY, Refused, Scenario, Transcripts, differences
from tests.engine.unpatched import every_scenario

RELEASE = "0.5.9"
SEEN = {"status": 200, "tokens": [[1, 2], [3]], "near": 0.5}


@pytest.fixture(autouse=True)
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a wheel without the wheel."""
    monkeypatch.setattr(transcripts, "wheel_digest", lambda version: f"wheel of {version}")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "code.py"
    file.write_text('"""Says something."""\n\ndef ask():\n    return 1\n')
    return file


def never(version: str) -> Any:
    raise AssertionError(f"{version} was run")


def scenario_of(code: Path, run: Callable[[str], Any] = lambda version: SEEN) -> Scenario:
    def asked(version: str) -> Any:
        return run(version)

    return Scenario(asked, (code,), lambda version: True)


def git(directory: Path, *words: str) -> None:
    someone = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *someone, *words], cwd=directory, check=True, capture_output=True)


def commit(directory: Path) -> None:
    git(directory, "add", ".")
    git(directory, "commit", "--message", "transcripts")


@pytest.fixture
def directory(tmp_path: Path, code: Path) -> Path:
    """In git, with a transcript of one scenario on one release."""
    found = tmp_path / "transcripts"
    found.mkdir()
    git(found, "init", "--quiet")
    assert Transcripts(anew=True, directory=found).of(RELEASE, scenario_of(code)) == SEEN
    commit(found)
    return found


def test_a_transcript_with_the_right_digests_is_used(directory: Path, code: Path) -> None:
    assert Transcripts(directory=directory).of(RELEASE, scenario_of(code, never)) == SEEN


def test_it_is_text_that_a_person_can_read(directory: Path) -> None:
    text = (directory / f"{RELEASE}.yaml").read_text()
    assert text.startswith(f"# What sglang {RELEASE} does without mmlane")
    assert "\n    - [1, 2]\n" in text


def test_a_missing_transcript_is_refused(directory: Path, code: Path) -> None:
    for version, scenario in (("0.5.10", scenario_of(code)), (RELEASE, replace(scenario_of(code), run=never))):
        with pytest.raises(Refused, match=rf"no transcript of \w+ on {version}; run: make transcripts ONLY="):
            Transcripts(directory=directory).of(version, scenario)


def test_a_transcript_of_another_wheel_is_refused(
    directory: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcripts, "wheel_digest", lambda version: "another")
    refused(directory, code, "wheel")


def test_a_transcript_of_another_devkit_is_refused(
    directory: Path, code: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transcripts, "DEVKIT", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n")
    refused(directory, code, "devkit")


def test_a_transcript_of_another_scenario_is_refused(directory: Path, code: Path) -> None:
    code.write_text(code.read_text().replace("return 1", "return 2"))
    refused(directory, code, "scenario")


def refused(directory: Path, code: Path, part: str) -> None:
    with pytest.raises(Refused, match=f"made with another {part} .*; run: make transcripts ONLY={RELEASE}"):
        Transcripts(directory=directory).of(RELEASE, scenario_of(code, never))


def test_comments_docstrings_and_empty_lines_do_nothing(directory: Path, code: Path) -> None:
    other = code.read_text().replace("Says something.", "Says it\nin other words.")
    code.write_text("# why\n\n\n" + other.replace("def ask():", "    # what\ndef ask():\n    'Asks.'") + "\n")
    assert Transcripts(directory=directory).of(RELEASE, scenario_of(code, never)) == SEEN


def test_anew_the_same_is_no_change_and_the_key_is_renewed(directory: Path, code: Path) -> None:
    code.write_text("def ask():\n    return 2\n")
    again = {**SEEN, "near": 0.500001}
    scenario = scenario_of(code, lambda version: again)
    anew = Transcripts(anew=True, directory=directory)
    assert anew.of(RELEASE, scenario) == again
    assert anew.change(RELEASE, scenario) is None
    assert Transcripts(directory=directory).of(RELEASE, scenario_of(code, never)) == again


def test_anew_what_would_say_the_same_is_not_written(directory: Path, code: Path) -> None:
    before = (directory / f"{RELEASE}.yaml").read_text()
    Transcripts(anew=True, directory=directory).of(
        RELEASE, scenario_of(code, lambda _: {**SEEN, "near": 0.500001})
    )
    assert (directory / f"{RELEASE}.yaml").read_text() == before


def test_anew_a_change_is_written_and_stays_one_until_it_is_committed(directory: Path, code: Path) -> None:
    now = {**SEEN, "tokens": [[1, 2], [4]]}
    runs = []

    def run(version: str) -> Any:
        runs.append(version)
        return now

    scenario = scenario_of(code, run)
    for _ in range(2):
        anew = Transcripts(anew=True, directory=directory)
        assert anew.of(RELEASE, scenario) == anew.of(RELEASE, scenario) == now
        assert anew.change(RELEASE, scenario) == "/tokens/1/0: 3 before, 4 now"
    assert runs == [RELEASE] * 2
    read = Transcripts(directory=directory)
    assert read.of(RELEASE, scenario_of(code, never)) == now
    assert read.change(RELEASE, scenario) == "/tokens/1/0: 3 before, 4 now"
    commit(directory)
    assert Transcripts(anew=True, directory=directory).change(RELEASE, scenario) is None


def test_a_transcript_that_git_does_not_have_is_no_change(directory: Path, code: Path) -> None:
    anew = Transcripts(anew=True, directory=directory)
    assert anew.change("0.5.10", scenario_of(code)) is None


def test_anew_a_run_that_fails_is_not_run_again(directory: Path, code: Path) -> None:
    runs = []

    def run(version: str) -> Any:
        runs.append(version)
        raise OSError("no engine")

    anew = Transcripts(anew=True, directory=directory)
    for _ in range(2):
        with pytest.raises(OSError, match="no engine"):
            anew.of(RELEASE, scenario_of(code, run))
    assert runs == [RELEASE]


def test_every_transcript_is_of_a_scenario_that_there_is() -> None:
    names = {scenario.name for scenario in every_scenario()}
    for file in DIRECTORY.glob("*.yaml"):
        assert yaml.safe_load(file.read_text()).keys() <= names, file


def test_other_scenarios_stay_as_they_are_written(directory: Path, code: Path) -> None:
    other = scenario_of(code)
    Transcripts(anew=True, directory=directory).of(RELEASE, replace(other, run=run_of_another))
    assert Transcripts(directory=directory).of(RELEASE, scenario_of(code, never)) == SEEN


def run_of_another(version: str) -> Any:
    return [version]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"b": 1}, [": {'a': 1} before, {'b': 1} now"]),
        ([1, 2], [1], [": [1, 2] before, [1] now"]),
        ([1.0, "x"], [1.1, "y"], ["/0: 1.0 before, 1.1 now", "/1: x before, y now"]),
        (1, True, [": 1 before, True now"]),
    ],
)
def test_differences(before: Any, after: Any, told: list[str]) -> None:
    assert list(differences(before, after)) == told
