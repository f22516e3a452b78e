"""Engines that mmlane was not made for, and plugins beside it: the doctor and the engine's start say the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from devkit.environment import base_environment, engine_environment
from devkit.installer import site_packages
from devkit.wheels import wheel_source
from tests.conftest import NEWEST
from tests.engine import forks
from tests.install.agreement import agree, doctor, start, states
from tests.install.environments import Place, Wheel

MakePlace = Callable[..., Place]

EDITED = "sglang/srt/managers/io_struct.py"
FAN_OUT = "def _handle_parallel_sampling(self):"  # of a function that mmlane replaces


def old_engine(directory: Path) -> Path:
    """0.5.8 as far as its metadata: too old for anything of it to be looked at."""
    package = directory / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    metadata = directory / "sglang-0.5.8.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.8\n")
    return directory


def edited_engine(directory: Path) -> Path:
    """The newest release, called 99.0, in which a function that mmlane replaces has another signature."""
    shutil.copytree(wheel_source(NEWEST), directory)
    (metadata,) = directory.glob("sglang-*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {NEWEST}\n", "\nVersion: 99.0\n"))
    metadata.parent.rename(directory / "sglang-99.0.dist-info")
    file = directory / EDITED
    assert FAN_OUT in file.read_text()
    file.write_text(file.read_text().replace(FAN_OUT, FAN_OUT.replace("self", "self, ours")))
    return directory


def test_a_release_that_is_too_old(tmp_path: Path, place: MakePlace) -> None:
    way = Wheel(place(old_engine(tmp_path / "engine")))
    way.install()
    found = doctor(way, code=1)
    agree(found, start(way))
    (line,) = found["problems"]
    assert line.startswith("sglang 0.5.8 is unsupported: ") and line.endswith(" MMLANE=off")
    quiet = doctor(way, code=0, MMLANE="off")
    assert quiet["problems"] == [] and start(way, MMLANE="off") is None
    strict = way.run("-c", "import sglang", MMLANE_STRICT="1")
    assert strict.returncode == 1 and line in strict.stderr


def test_a_newer_version_that_was_edited(tmp_path: Path, place: MakePlace) -> None:
    way = Wheel(place(edited_engine(tmp_path / "engine")))
    way.install()
    found = doctor(way, code=1)
    began = start(way)
    agree(found, began)
    assert began is not None and began["untested"].startswith(f"untested: newer than {NEWEST}")
    (line,) = found["problems"]
    id = line.removeprefix("skipped ").partition(":")[0]
    assert line.endswith(f" MMLANE_DISABLE={id}") and "(self, ours)" in line
    assert {state for name, (state, _) in states(found).items() if name in id.split(",")} == {"skipped"}
    silenced = doctor(way, code=0, MMLANE_DISABLE=id)
    agree(silenced, start(way, MMLANE_DISABLE=id))


# --- a whole engine: patches are applied, and its plugins are loaded, as at its start ---

LAUNCH = """
import sglang.launch_server, sglang.srt.entrypoints.engine, sglang.srt.managers.scheduler
try:
    from sglang.srt.plugins import load_plugins
except ImportError:  # below 0.5.11
    pass
else:
    load_plugins()
import theirs
assert theirs.loaded == WANTED, theirs.loaded
from mmlane import entry
assert {d.state for d in entry.session.patcher.decisions.values()} <= {"applied", "native"}
"""
THEIRS = "loaded = False\ndef register():\n  global loaded\n  loaded = True\n"


def whole_engine(release: str, place: Place) -> Wheel:
    """An environment with a release, all that it needs, another plugin, and mmlane."""
    below = (site_packages(engine_environment(release).root), site_packages(base_environment()))
    way = Wheel(Place(place.root, place.wheel, place.checkout, below))
    (way.packages() / "theirs.py").write_text(THEIRS)
    metadata = way.packages() / "theirs-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ntheirs = theirs:register\n")
    way.environ = {k: v for k, v in forks.ENV.items() if k != "PATH"}
    way.install()
    return way


@pytest.mark.matrix
@pytest.mark.releases("newest", "0.5.9", "0.5.12.post1")
def test_beside_another_plugin_and_where_the_engine_loads_none_but_that(release: str, place: MakePlace) -> None:
    way = whole_engine(release, place())
    has_plugins = "load_plugins" in (wheel_source(release) / "sglang/launch_server.py").read_text()
    for environ in ({}, {"SGLANG_PLUGINS": "theirs"}):
        found = doctor(way, code=0, **environ)
        agree(found, start(way, script=LAUNCH.replace("WANTED", str(has_plugins)), **environ))
