"""The workflows: every release and every patch has a job. The commands that decide it are run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from devkit import installer
from mmlane import __version__
from tools import pythons

Workflow = dict[Any, Any]


@pytest.fixture(scope="module")
def workflows() -> dict[str, Workflow]:
    """Each workflow, by the name of its file."""
    found = (Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml")
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in found}


@pytest.fixture(scope="module")
def table() -> Any:
    """The table as its file has it, read by none of our own code."""
    return yaml.safe_load((Path(__file__).parents[2] / "compat_matrix.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path, checkout: Path) -> Path:
    """A checkout with `.venv`, in which steps can be run: programs of this Python, and links to our modules."""
    for name in ("tools", "devkit", "compat_matrix.yaml"):
        (tmp_path / name).symlink_to(checkout / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("mmlane", " -m mmlane")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def step(job: dict[str, Any], words: str) -> dict[str, Any]:
    """The one step of a job whose command has these words in it."""
    (found,) = [step for step in job["steps"] if words in step.get("run", "")]
    return dict(found)


def run(command: str, place: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as the forge does with `shell: bash`."""
    bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
    env = {**os.environ, **environ}
    return subprocess.run(bash, cwd=place, env=env, capture_output=True, text=True, check=False)


def pieces(workflows: dict[str, Workflow], caller: str, job: str, place: Path) -> list[str]:
    """What the matrix of the engine's jobs becomes when a workflow calls them."""
    call = workflows[caller]["jobs"][job]
    assert call["uses"] == "./.github/workflows/engine.yml"
    engine = workflows["engine"]["jobs"]
    assert engine["engine"]["needs"] == "shards"
    assert engine["engine"]["strategy"]["matrix"] == {"piece": "${{ fromJSON(needs.shards.outputs.pieces) }}"}
    shards = step(engine["shards"], "tools.shards")
    assert engine["shards"]["outputs"] == {"pieces": f"${{{{ steps.{shards['id']}.outputs.pieces }}}}"}
    assert shards["env"] == {"SHARDS": "${{ inputs.shards }}"}
    output = place / "output"
    done = run(shards["run"], place, SHARDS=call["with"]["shards"], GITHUB_OUTPUT=str(output))
    assert done.returncode == 0, done.stderr
    name, _, value = output.read_text().partition("=")
    assert name == "pieces"
    found: list[str] = json.loads(value)
    return found


def test_every_release_has_a_job_each_night(workflows: dict[str, Workflow], table: Any, place: Path) -> None:
    found = pieces(workflows, "nightly", "matrix", place)
    assert sorted(found) == sorted([*map(str, table["engines"]), "contract", "install", "no-release"])


def test_the_usual_releases_have_a_job_for_each_change(
    workflows: dict[str, Workflow], table: Any, place: Path
) -> None:
    found = pieces(workflows, "ci", "engine", place)
    assert {*found} == {*map(str, table["usual"]), str(table["engines"][-1]), "no-release"}


def test_a_job_runs_its_piece(workflows: dict[str, Workflow]) -> None:
    found = step(workflows["engine"]["jobs"]["engine"], "make matrix")
    assert found["run"].endswith(' make matrix ONLY="$PIECE"')
    assert found["env"] == {"PIECE": "${{ matrix.piece }}"}


def test_every_patch_is_tested_on_every_release(
    workflows: dict[str, Workflow], table: Any, checkout: Path
) -> None:
    """By the contract tests, for each change."""
    assert step(workflows["ci"]["jobs"]["contract"], "make contract")
    (command,) = re.findall(
        r"^contract: .*\n\t\$\(RUN\) -m (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE
    )
    assert command == "pytest tests/contract"
    collect = [sys.executable, "-m", "pytest", "tests/contract/test_matrix.py", "--collect-only", "-q"]
    done = subprocess.run(collect, cwd=checkout, capture_output=True, text=True, check=True)
    found = set(re.findall(r"::test_cell_tells_the_truth\[(.+)\]$", done.stdout, re.MULTILINE))
    assert found == {f"{release}-{patch}" for release in table["engines"] for patch in table["patches"]}


def test_each_part_of_make_test_has_a_job(workflows: dict[str, Workflow], checkout: Path) -> None:
    (parts,) = re.findall(r"^test: (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    jobs = workflows["ci"]["jobs"]
    assert {*parts.split()} <= jobs.keys()
    for part in parts.split():
        assert "uses" in jobs[part] or step(jobs[part], f"make {part}")["run"] == f"make {part}"


def test_every_supported_python_has_a_job(workflows: dict[str, Workflow]) -> None:
    unit = workflows["ci"]["jobs"]["unit"]
    ours = "{}.{}".format(*installer.PYTHON)
    assert sorted(unit["strategy"]["matrix"]["python"]) == sorted([*pythons.VERSIONS, ours])
    assert step(unit, "make unit")["if"] == f"matrix.python == '{ours}'"
    others = step(unit, "make pythons")
    assert (others["if"], others["run"]) == (f"matrix.python != '{ours}'", 'make pythons ONLY="$VERSION"')
    assert others["env"] == {"VERSION": "${{ matrix.python }}"}


def test_what_is_run_exists(workflows: dict[str, Workflow], checkout: Path) -> None:
    makefile = (checkout / "Makefile").read_text()
    commands = [
        step["run"]
        for workflow in workflows.values()
        for job in workflow["jobs"].values()
        for step in job.get("steps", [])
        if "run" in step
    ]
    targets = re.findall(r"make (?:--silent )?([\w./-]+)", "\n".join(commands))
    assert {"lint", "unit", "lane", "contract", "matrix", "matrix-new", "dist", "pythons"} <= {*targets}
    virtual = makefile.replace("$(INSTALLED)", ".venv/.installed").replace("$(READY)", ".venv/.ready")
    assert [t for t in targets if not re.search(rf"^{re.escape(t)}:", virtual, re.MULTILINE)] == []
    modules = re.findall(r"-m (tools\.\w+)", "\n".join(commands))
    assert {"tools.shards", "tools.new_release", "tools.changelog"} <= {*modules}
    assert [m for m in modules if not (checkout / m.replace(".", "/")).with_suffix(".py").is_file()] == []


@pytest.mark.skipif(shutil.which("jq") is None, reason="the forge's machines have jq, this one has not")
def test_one_check_stands_for_all_jobs(workflows: dict[str, Workflow], place: Path) -> None:
    jobs = workflows["ci"]["jobs"]
    gate = jobs["all"]
    assert {*gate["needs"]} == jobs.keys() - {"all"}
    assert gate["if"] == "always()"
    found = step(gate, "jq")
    assert found["env"] == {"NEEDS": "${{ toJSON(needs) }}"}
    for last, passes in (("success", True), ("skipped", True), ("failure", False), ("cancelled", False)):
        needs = {"lint": {"result": "success", "outputs": {}}, "other": {"result": last, "outputs": {}}}
        assert (run(found["run"], place, NEEDS=json.dumps(needs)).returncode == 0) is passes


def test_a_tag_that_is_not_the_version_is_not_released(workflows: dict[str, Workflow], place: Path) -> None:
    command = step(workflows["release"]["jobs"]["build"], "mmlane --version")["run"]
    assert run(command, place, GITHUB_REF_NAME=f"v{__version__}").returncode == 0
    for other in (__version__, "v9.9.9", f"v{__version__}rc1"):
        assert run(command, place, GITHUB_REF_NAME=other).returncode != 0


def test_only_jobs_that_need_it_can_write(workflows: dict[str, Workflow]) -> None:
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in workflows.values())
    writes = {
        (name, job, right)
        for name, workflow in workflows.items()
        for job, settings in workflow["jobs"].items()
        for right, how in settings.get("permissions", {}).items()
        if how == "write"
    }
    assert writes == {
        ("new-release", "review", "issues"),
        ("release", "publish", "id-token"),
        ("release", "announce", "contents"),
    }
