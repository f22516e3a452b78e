"""Two engines in one process, itself a child of a program that uses shared memory of its own; see embedded.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from devkit.server import free_port
from tests.engine.asking import image
from tests.engine.digests import compare
from tests.engine.field_reports import on
from tests.engine.transcripts import HERE, Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine

SCRIPT = HERE / "embedded.py"
SEEDS = ("4", "8")


@on("0.5.12.post1")
def test_two_engines_in_a_spawned_child(
    release: str, plugin_wheel: Path, transcripts: Transcripts, tmp_path: Path
) -> None:
    """Both answer by a lane of their own, and whose segments the parent's tracker looks after is not confused."""
    unpatched = transcripts.of(release, plain)["pictures"]
    pictures = [tmp_path / f"{seed}.jpg" for seed in SEEDS]
    for picture, seed in zip(pictures, SEEDS, strict=True):
        picture.write_bytes(image(int(seed)))
    engines = WatchedServer(release, plugin=plugin_wheel, tp=1)
    found = engines.run(SCRIPT, str(free_port()), ",".join(map(str, pictures)))
    log = (engines.notes / "log").read_text(errors="replace")
    assert found["code"] == 0, log[-6000:]
    assert found["answers"] == [[unpatched[seed]["tokens"][0] for seed in SEEDS]] * 2
    first, second = found["lanes"]
    assert first["name"] != second["name"]
    for lane in (first, second):
        assert lane["puts"] >= len(SEEDS) and lane["fallbacks"].keys() <= {"not_open"}
        assert (lane["tickets"], lane["used_bytes"]) == (0, 0)
    assert found["kept"]
    # The engine leaves these, with mmlane or without.
    assert [name for name in found["left"] if not name.startswith(("sem.", "sglang_loads_"))] == []
    assert set(re.findall(r"resource_tracker: There appear to be \d+ leaked (\w+)", log)) <= {"semaphore"}
    assert not re.search(r"resource_tracker\.py.*\n(.*\n){0,4}KeyError", log)
    compare(engines.notes).verify(ranks=1, answered=2 * len(SEEDS))
