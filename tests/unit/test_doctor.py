"""`mmlane doctor` as a user runs it: what it says, in which form, and with which exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import mmlane_patches
from mmlane import __version__, compat, host
from mmlane.cli import lane_size
from mmlane.cli.checks import run_checks
from mmlane.cli.units import size
from mmlane.engine import Engine
from mmlane.settings import PINNED, VARIABLES, Settings, read

MIB = 1 << 20
ENGINES = [str(version) for version in compat.matrix().engines]


COMMAND = [sys.executable, "-c", "from mmlane.cli import main; main()"]


def mmlane(
    *words: str,
    path: Path | None = None,
    preexec: Callable[[], None] | None = None,
    command: list[str] = COMMAND,
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without what the developer's shell says."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MMLANE", "PYTHON"))}
    env.update({"COLUMNS": "80", **environ})
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [*command, *words], env=env, capture_output=True, text=True, check=False, preexec_fn=preexec
    )


def doctor(*words: str, code: int = 0, path: Path | None = None, **options: Any) -> dict[str, Any]:
    """What it says as JSON, after a check of its exit code."""
    done = mmlane("doctor", "--json", *words, path=path, **options)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["exit_code"] == code
    return found


def stand_in(path: Path, version: str) -> Path:
    """An engine with a version and no code: nothing that a patch wants is there."""
    (path / "sglang").mkdir()
    (path / "sglang" / "__init__.py").write_text("raise RuntimeError('the doctor imported the engine')")
    metadata = path / f"sglang-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    return path


# --- about a release, without any engine ---


@pytest.mark.parametrize("release", ENGINES)
def test_every_release_gets_the_plan_of_the_table(release: str) -> None:
    specs, _ = compat.contributed(mmlane_patches)
    plan = compat.plan(specs, Engine(Version(release), None), Settings())
    found = doctor("--engine", release)
    states = {"planned": "applied", "native": "native", "skipped": "skipped"}
    assert [(p["id"], p["state"], p["reason"]) for p in found["patches"]] == [
        (id, states[decision.state], decision.reason) for id, decision in plan.items()
    ]
    assert found["engine"] == {"version": release, "untested": "", "root": None}
    assert found["problems"] == found["notes"] == []
    assert found["shm"] is found["kernel"] is found["triggers"] is found["memory"] is None


def test_a_release_that_is_newer_than_the_table_is_one_note_and_strict_makes_it_count() -> None:
    found = doctor("--engine", "99.0")
    (note,) = found["notes"]
    assert note.startswith(f"sglang 99.0 is untested: newer than {ENGINES[-1]}; it is treated like")
    assert "nothing was checked" in note and "run `mmlane doctor` there" in note
    doctor("--engine", "99.0", "--strict", code=1)


def test_an_installed_engine_that_is_newer_than_the_table_has_been_compared(tmp_path: Path) -> None:
    found = doctor(path=stand_in(tmp_path, "99.0"), code=1)
    (note,) = [note for note in found["notes"] if "untested" in note]
    assert f"newer than {ENGINES[-1]}, checked by signature: every function to be patched was compared" in note


def test_a_release_that_is_too_old_is_one_problem() -> None:
    found = doctor("--engine", "0.5.8", code=1)
    assert {patch["state"] for patch in found["patches"]} == {"skipped"}
    (line,) = found["problems"]
    assert line.startswith("sglang 0.5.8 is unsupported: older than 0.5.9, the first release")
    for part in ("runs without them", "does not start with MMLANE_STRICT=1", "upgrade sglang", "MMLANE=off"):
        assert part in line
    assert found["notes"] == []
    shown = mmlane("doctor", "--engine", "0.5.8", COLUMNS="1000").stdout
    assert shown.count("older than 0.5.9") == 2  # the title, and the problem
    assert "skipped" not in shown


def test_off_is_the_way_to_live_with_a_release_that_is_too_old() -> None:
    found = doctor("--engine", "0.5.8", MMLANE="off")
    assert found["problems"] == [] and found["notes"] == ["sglang 0.5.8 is unsupported: older than 0.5.9"]


def test_a_fault_that_is_fixed_cannot_be_taken_for_one_that_is_there() -> None:
    shown = " ".join(mmlane("doctor", "--engine", "0.5.12", COLUMNS="200").stdout.split())
    specs, _ = compat.contributed(mmlane_patches)
    cells = {spec.id: spec.cell(Version("0.5.12")) for spec in specs}
    fan_out, deferred_unwrap = cells["fan_out"], cells["deferred_unwrap"]
    assert fan_out is not None and deferred_unwrap is not None
    assert f"applied fan_out fixes: {fan_out.reason}" in shown
    assert f"native deferred_unwrap already in the engine: {deferred_unwrap.reason}" in shown
    shown = " ".join(
        mmlane("doctor", "--engine", "0.5.12", MMLANE_DISABLE="fan_out", COLUMNS="200").stdout.split()
    )
    assert "skipped fan_out turned off by MMLANE_DISABLE" in shown and "applied fan_out " not in shown


def test_what_the_user_turned_off_is_no_problem() -> None:
    found = doctor("--engine", "0.5.12", MMLANE_DISABLE="fan_out")
    (fan_out,) = [patch for patch in found["patches"] if patch["id"] == "fan_out"]
    assert fan_out["state"] == "skipped" and fan_out["chosen"]
    assert found["settings"]["disable"] == ["fan_out"]


def test_off_applies_nothing_and_is_no_problem() -> None:
    found = doctor("--engine", "0.5.12", MMLANE="off")
    assert {patch["state"] for patch in found["patches"]} == {"skipped", "native"}
    assert found["settings"]["mode"] == "off"


# --- settings ---


def test_every_setting_is_shown_for_programs() -> None:
    found = doctor(code=3)
    quarter = host.memory().lane_capacity()
    assert found["settings"] == {
        "mode": "lane",
        "disable": [],
        "strict": False,
        "log": "info",
        "capacity": quarter,
        "pinned": min(PINNED, quarter),
        "sweep": "1",
        "defaults": ["mode", "disable", "strict", "log", "capacity", "pinned", "sweep"],
        "unknown": [],
    }
    wanted: dict[str, Any] = {
        "MMLANE": "backport",
        "MMLANE_DISABLE": "fan_out",
        "MMLANE_STRICT": "1",
        "MMLANE_LOG": "debug",
        "MMLANE_CAPACITY_MB": "64",
        "MMLANE_PINNED_MB": "0",
        "MMLANE_SWEEP": "private",
    }
    assert wanted.keys() == set(VARIABLES)
    assert doctor(code=3, **wanted)["settings"] == {
        "mode": "backport",
        "disable": ["fan_out"],
        "strict": True,
        "log": "debug",
        "capacity": 64 * MIB,
        "pinned": 0,
        "sweep": "private",
        "defaults": [],
        "unknown": [],
    }


def test_what_depends_on_the_machine_is_not_told_about_a_release() -> None:
    found = doctor("--engine", "0.5.12")["settings"]
    assert found["capacity"] is found["pinned"] is None
    assert doctor("--engine", "0.5.12", MMLANE_CAPACITY_MB="64")["settings"]["capacity"] == 64 * MIB


def test_every_setting_is_shown_for_a_person() -> None:
    quarter = host.memory().lane_capacity()
    shown = " ".join(mmlane("doctor", COLUMNS="200").stdout.split())
    for text in (
        "mode lane (default)",
        "turned off none (default)",
        "strict no (default)",
        "log info (default)",
        f"capacity {size(quarter)}, a quarter of the memory, for all tokenizer workers (default)",
        f"pinned {size(min(PINNED, quarter))} on CUDA, for all tokenizer workers (default)",
        "sweep reclaim what is provably dead (default)",
    ):
        assert text in shown
    shown = " ".join(mmlane("doctor", MMLANE_CAPACITY_MB="64", MMLANE_PINNED_MB="0", COLUMNS="200").stdout.split())
    assert "capacity 64 MiB for each tokenizer worker" in shown and "pinned nothing" in shown


def test_an_unknown_variable_is_a_note_with_the_nearest_known_one() -> None:
    found = doctor("--engine", "0.5.12", MMLANE_CAPCITY_MB="64", MMLANE_CACHE="/tmp")
    assert found["settings"]["unknown"] == ["MMLANE_CAPCITY_MB"]
    (note,) = found["notes"]
    assert note == "unknown variables, which do nothing: MMLANE_CAPCITY_MB (did you mean MMLANE_CAPACITY_MB?)"


@pytest.mark.parametrize("count", ["99999999999", "9" * 30])
def test_a_capacity_that_cannot_be_had_is_a_problem(count: str) -> None:
    found = doctor(code=3, MMLANE_CAPACITY_MB=count)
    (line,) = [line for line in found["problems"] if "a lane" in line]
    assert f"MMLANE_CAPACITY_MB={count}" in line and "shared-memory segments" in line
    assert size(host.memory().lane_capacity()) in line  # what it would be without
    assert not [note for note in found["notes"] if "CAPACITY" in note]


def test_the_capacity_is_not_checked_where_no_lane_is_used() -> None:
    environs: tuple[dict[str, Any], ...] = ({"MMLANE": "backport"}, {"MMLANE_DISABLE": "lane"})
    for environ in environs:
        found = doctor(code=3, MMLANE_CAPACITY_MB="99999999999", **environ)
        assert not [line for line in found["problems"] + found["notes"] if "CAPACITY" in line]
        assert "capacity    not used: no lane" in mmlane("doctor", **environ).stdout


def without_address_room() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def test_the_default_capacity_is_tried_too() -> None:
    if host.memory().lane_capacity() < 1 << 30:
        pytest.skip("a quarter of the memory is no more than the doctor itself may have here")
    found = doctor(code=3, preexec=without_address_room)
    (line,) = [line for line in found["problems"] if "a lane" in line]
    assert "a quarter of the memory" in line and "MMLANE_CAPACITY_MB" in line


# What a machine of 8 GiB says, 6 of them available, with and without a GPU.
SMALL = host.Memory(total=8 << 30, limit=None, used=None, available=6 << 30)
LIMITED = host.Memory(total=64 << 30, limit=8 << 30, used=2 << 30, available=6 << 30)
FULL = host.Memory(total=8 << 30, limit=None, used=None, available=512 << 20)


@pytest.mark.parametrize(
    ("memory", "gpu", "environ", "notes"),
    [
        (SMALL, True, {}, []),
        (LIMITED, True, {}, []),
        (SMALL, False, {"MMLANE_CAPACITY_MB": "8192"}, []),
        (SMALL, False, {"MMLANE_CAPACITY_MB": "8193"}, ["MMLANE_CAPACITY_MB=8193", "8 GiB of memory"]),
        (LIMITED, False, {"MMLANE_CAPACITY_MB": "8193"}, ["MMLANE_CAPACITY_MB=8193", "8 GiB of memory"]),
        (SMALL, False, {"MMLANE_PINNED_MB": "2048"}, []),
        (SMALL, False, {"MMLANE_PINNED_MB": "2049"}, ["MMLANE_PINNED_MB=2049", "capacity of 2 GiB"]),
        (SMALL, False, {"MMLANE_PINNED_MB": "0"}, []),
        (FULL, False, {}, []),
        (FULL, True, {}, ["1 GiB of pinned memory by default", "512 MiB are available"]),
        (FULL, False, {"MMLANE_PINNED_MB": "600"}, ["MMLANE_PINNED_MB=600", "512 MiB are available"]),
        (FULL, True, {"MMLANE_PINNED_MB": "500"}, []),
    ],
)
def test_sizes_are_compared_with_the_machine(
    memory: host.Memory, gpu: bool, environ: dict[str, str], notes: list[str]
) -> None:
    found = lane_size.notes(read(environ), memory, gpu=gpu)
    assert len(found) == bool(notes)
    for text in notes:
        assert text in found[0]


# --- usage ---


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MMLANE", "on", "MMLANE=on is not one of: lane, backport, off"),
        ("MMLANE_STRICT", "yes", "MMLANE_STRICT=yes is not one of: 0, 1"),
        ("MMLANE_LOG", "loud", "MMLANE_LOG=loud is not one of: debug, info, warning"),
        ("MMLANE_DISABLE", "nonsense", "MMLANE_DISABLE=nonsense: no such patch; there are: shm_pointer"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_right_ones(variable: str, value: str, message: str) -> None:
    done = mmlane("doctor", "--engine", "0.5.12", path=None, preexec=None, command=COMMAND, **{variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_setting_is_refused_where_an_engine_is_installed(tmp_path: Path) -> None:
    done = mmlane("doctor", path=stand_in(tmp_path, "0.5.12"), MMLANE="on")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "mmlane: MMLANE=on is not one of: lane, backport, off"


def test_a_word_that_is_no_version_is_refused() -> None:
    done = mmlane("doctor", "--engine", "newest")
    assert done.returncode == 2 and "is not a version" in done.stderr


@pytest.mark.parametrize(
    ("words", "environ", "code", "error"),
    [
        ((), {"MMLANE": "on"}, 2, "MMLANE=on is not one of: lane, backport, off"),
        (("--engine", "0.5.12"), {"MMLANE_DISABLE": "x"}, 2, "MMLANE_DISABLE=x: no such patch; there are: "),
        (("--engine", "newest"), {}, 2, "'newest' is not a version"),
        (("--engine",), {}, 2, "requires an argument"),
        (("--all",), {}, 2, "No such option: --all"),
        ((), {}, 3, "no engine: this Python cannot import sglang"),
    ],
)
def test_an_error_is_json_where_that_was_asked_for(
    words: tuple[str, ...], environ: dict[str, Any], code: int, error: str
) -> None:
    assert error in doctor(*words, code=code, **environ)["error"]


def test_without_an_error_the_key_is_null() -> None:
    assert doctor("--engine", "0.5.12")["error"] is None


def test_a_failure_of_the_doctor_itself_is_json_as_well(tmp_path: Path) -> None:
    path = stand_in(tmp_path, "0.5.12")
    (path / "sitecustomize.py").write_text("import os; del os.statvfs")
    found = doctor(path=path, code=1)
    assert found["error"].startswith("AttributeError: ") and found["error"].endswith("'statvfs'")
    done = mmlane("doctor", path=path)
    assert done.returncode == 1 and "AttributeError" in done.stderr


def test_version() -> None:
    done = mmlane("--version")
    assert (done.returncode, done.stdout) == (0, f"mmlane {__version__}\n")


def test_python_dash_m_is_the_same_command() -> None:
    for words in (["doctor", "--engine", "0.5.12"], ["doctor", "--engine", "newest"], ["--version"]):
        command = mmlane(*words)
        module = mmlane(*words, command=[sys.executable, "-m", "mmlane"])
        assert (module.returncode, module.stdout) == (command.returncode, command.stdout)
    assert "python -m mmlane" in mmlane("--help", command=[sys.executable, "-m", "mmlane"]).stdout


# --- about this interpreter and machine ---


def test_no_engine_has_its_own_exit_code_and_the_machine_is_told_all_the_same() -> None:
    found = doctor(code=3)
    assert found["engine"] is None and found["patches"] == []
    assert found["problems"][0].startswith("no engine: this Python cannot import sglang")
    assert {feature["name"] for feature in found["kernel"]} >= {"memfd_create", "SCM_RIGHTS"}
    assert found["shm"]["total"] > 0


def test_an_installed_engine_is_checked_and_not_imported(tmp_path: Path) -> None:
    found = doctor(path=stand_in(tmp_path, "0.5.12"), code=1)
    assert found["engine"] == {"version": "0.5.12", "untested": "", "root": str(tmp_path)}
    states = {patch["id"]: patch["state"] for patch in found["patches"]}
    assert states["deferred_unwrap"] == "native"
    assert states["shm_pointer"] == states["fan_out"] == "skipped"
    assert any("skipped fan_out: wanted sglang." in line for line in found["problems"])


def test_strict_for_the_engine_does_not_stop_the_doctor(tmp_path: Path) -> None:
    found = doctor(path=stand_in(tmp_path, "0.5.12"), code=1, MMLANE_STRICT="1")
    assert found["settings"]["strict"] is True


def test_the_triggers_of_this_installation() -> None:
    found = doctor(code=3)["triggers"]
    assert Path(found["start_file"]).name in ("mmlane.pth", "mmlane.start")
    assert found["ran"] is True
    assert found["entry_point"] == "mmlane.entry:register"


DASH_M = ["-m", "mmlane"]


def test_a_start_line_that_python_passed_over_is_a_problem() -> None:
    """Without `site`, no .pth file is read, and nothing of mmlane runs in the engine's processes."""
    everything = os.pathsep.join(entry for entry in sys.path if entry)
    options: dict[str, Any] = {"command": [sys.executable, "-S", *DASH_M], "PYTHONPATH": everything}
    found = doctor(code=3, **options)
    assert found["triggers"]["no_site"] is True and found["triggers"]["ran"] is False
    (line,) = [line for line in found["problems"] if "startup hook" in line]
    assert line.startswith("this Python was started with -S, so it runs no startup hook")
    assert "leave -S out" in line
    assert "not run: this Python was started with -S" in mmlane("doctor", COLUMNS="200", **options).stdout
    assert not [line for line in doctor(code=3, MMLANE="off", **options)["problems"] if "startup hook" in line]


def test_without_site_packages_the_command_says_so_in_a_line(checkout: Path) -> None:
    ours = os.pathsep.join(str(checkout / name) for name in ("plugin", "patches"))
    done = mmlane("doctor", command=[sys.executable, "-S", *DASH_M], PYTHONPATH=ours)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mmlane: No module named 'typer', which the command needs; leave out Python's -S")


def test_an_isolated_python_runs_the_start_line() -> None:
    found = doctor(code=3, command=[sys.executable, "-I", *DASH_M])
    assert found["triggers"]["ran"] is True and found["triggers"]["no_site"] is False


def test_with_mmlane_off_the_start_line_is_there_and_does_nothing() -> None:
    assert not [line for line in doctor(code=3, MMLANE="off")["problems"] if "startup hook" in line]
    assert "mmlane.pth (does nothing: MMLANE=off)" in mmlane("doctor", COLUMNS="200", MMLANE="off").stdout


# --- /dev/shm, in a mount namespace of its own ---

MOUNTS = subprocess.run(
    ["unshare", "-m", "mount", "-t", "tmpfs", "x", "/dev/shm"], capture_output=True, check=False
)
needs_mounts = pytest.mark.skipif(MOUNTS.returncode != 0, reason="no right to mount a /dev/shm here (needs root)")


def with_shm(mount: str, **environ: Any) -> dict[str, Any]:
    """What the doctor says of a /dev/shm that is mounted like that."""
    inside = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *COMMAND]
    return doctor(code=3, command=inside, **environ)


def about_shm(found: dict[str, Any], key: str) -> list[str]:
    return [line for line in found[key] if "/dev/shm" in line]


@needs_mounts
@pytest.mark.parametrize(
    ("mebibytes", "environ", "follows"),
    [
        (64, {}, ""),
        (8, {}, "features that the lane cannot carry, and that do not fit, travel inline"),
        (64, {"MMLANE": "backport"}, "features that do not fit travel inline"),
        (64, {"MMLANE_DISABLE": "lane"}, "features that do not fit travel inline"),
        (64, {"MMLANE": "off"}, "when it is full, without mmlane the engine may refuse image requests, or end"),
        (300, {"MMLANE": "backport"}, ""),
        (300, {"MMLANE": "off"}, ""),
    ],
)
def test_how_small_is_too_small_depends_on_what_uses_it(
    mebibytes: int, environ: dict[str, str], follows: str
) -> None:
    found = with_shm(f"mount -t tmpfs -o size={mebibytes}m x /dev/shm", **environ)
    notes = about_shm(found, "notes")
    assert about_shm(found, "problems") == [] and len(notes) == bool(follows)
    for note in notes:
        assert f"/dev/shm has {mebibytes} MiB left of {mebibytes} MiB: {follows}" in note and "--shm-size" in note


@needs_mounts
@pytest.mark.parametrize(
    ("environ", "follows"),
    [
        ({}, "features that the lane cannot carry travel inline"),
        ({"MMLANE": "backport"}, "features travel inline, which is slow"),
        ({"MMLANE": "off"}, "without mmlane the engine may refuse image requests, or end"),
    ],
)
def test_a_read_only_shm_is_to_be_mounted_otherwise_and_not_enlarged(
    environ: dict[str, str], follows: str
) -> None:
    found = with_shm("mount -t tmpfs -o ro,size=1m x /dev/shm", **environ)
    (line,) = about_shm(found, "problems")
    assert line.startswith(f"/dev/shm is mounted read-only: {follows}")
    assert "mount -o remount,rw /dev/shm" in line and "chmod" not in line
    assert about_shm(found, "notes") == [] and found["shm"]["read_only"] is True


@needs_mounts
def test_a_missing_shm_says_what_follows_in_this_mode() -> None:
    hidden = "mount -t tmpfs x /dev"
    (line,) = about_shm(with_shm(hidden), "problems")
    assert line.startswith(
        "no /dev/shm: features that the lane cannot carry travel inline, which is slower; mount a tmpfs there: "
    )


def test_what_carries_features_on_a_release() -> None:
    def carrier(release: str, **environ: str) -> str:
        return run_checks(Version(release), environ).carrier()

    assert carrier("0.5.12") == carrier(ENGINES[-1]) == "lane"
    assert carrier("0.5.12", MMLANE="backport") == carrier(ENGINES[-1], MMLANE_DISABLE="lane") == "segments"
    assert carrier("0.5.12", MMLANE="off") == carrier("0.5.12", MMLANE_DISABLE="shm_pointer") == "engine"


def test_leftovers_that_nothing_will_reclaim_are_not_promised_to_go() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = host.SHM / f"sgl_shm_mm_{gone.pid}_{os.urandom(4).hex()}"
    file.write_bytes(b"x")
    environs: tuple[dict[str, Any], ...] = (
        {"MMLANE": "off"},
        {"MMLANE_SWEEP": "0"},
        {"MMLANE_DISABLE": "shm_sweep"},
    )
    try:
        for environ in environs:
            (note,) = [note for note in doctor(code=3, **environ)["notes"] if "does not run" in note]
            assert "no start of an engine reclaims them with these settings" in note
    finally:
        file.unlink()


def test_leftovers_in_the_real_dev_shm_are_counted() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = host.SHM / f"sgl_shm_mm_{gone.pid}_{os.urandom(4).hex()}"
    file.write_bytes(b"x" * 12345)
    try:
        found = doctor(code=3)
        shown = mmlane("doctor").stdout
    finally:
        file.unlink()
    (segment,) = [s for s in found["shm"]["segments"] if s["name"] == file.name]
    assert segment == {"name": file.name, "kind": "engine", "bytes": 16384, "pid": gone.pid, "alive": False}
    assert any("name a maker that does not run" in note for note in found["notes"])
    assert "maker gone" in shown


# --- for a person ---


@pytest.mark.parametrize("columns", ["80", "120"])
def test_it_fits_the_terminal_and_says_every_state_as_a_word(columns: str, tmp_path: Path) -> None:
    engine = stand_in(tmp_path, "0.5.12")
    shown = mmlane("doctor", path=engine, COLUMNS=columns).stdout
    assert max(len(line) for line in shown.splitlines()) <= int(columns)
    assert "\x1b" not in shown  # not a terminal: no colour
    assert shown.startswith(f"mmlane {__version__} on sglang 0.5.12 (tested)")
    for word in (
        "skipped  shm_pointer",
        "native   deferred_unwrap",
        "memfd_create",
        "/dev/shm",
        "problem  skipped",
    ):
        assert word in shown


def test_doctor_without_problems_says_so() -> None:
    assert mmlane("doctor", "--engine", "0.5.12").stdout.rstrip().endswith("All fine.")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5 TiB"),
        (1 << 52, "4096 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
