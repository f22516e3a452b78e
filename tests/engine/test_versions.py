"""Two versions of mmlane in one engine, as an upgrade at the wrong moment makes: they refuse each other.

Of `test_uninstall`, the upgrade under a running engine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devkit.environment import disposable_environment
from mmlane.lane import protocol
from tests.conftest import CHECKOUT
from tests.engine import asking, server_lanes
from tests.engine.request_kinds import ANSWERED
from tests.engine.transcripts import Transcripts
from tests.engine.unpatched.plain import plain
from tests.engine.watching import WatchedServer

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

# Of Python's start, before that of mmlane: processes that the engine spawns get the other version.
OTHER_FIRST = """\
import sys; sys.path[:0] = [{path!r}] if "--multiprocessing-fork" in sys.orig_argv else []
"""


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel of a later mmlane, of another version of the protocol."""
    root, changed = tmp_path_factory.mktemp("other"), f"VERSION = {protocol.VERSION + 1}"
    return changed_wheel(root, "plugin/mmlane/lane/protocol.py", r"VERSION = \d+", changed)


def changed_wheel(root: Path, name: str, line: str, changed: str) -> Path:
    """A directory with the wheel of this checkout in which a line of one file is another. line: an expression."""
    tree = root / "tree"
    for part in ("plugin", "patches"):
        shutil.copytree(CHECKOUT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for part in ("pyproject.toml", "README.md", "LICENSE", "compat_matrix.yaml"):
        shutil.copy(CHECKOUT / part, tree / part)
    text, count = re.subn(f"^{line}$", changed, (tree / name).read_text(), flags=re.MULTILINE)
    assert count == 1
    (tree / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(root / "installed"), str(tree)], check=True)
    return root / "installed"


@pytest.mark.releases("0.5.12.post1", "0.5.9", "0.5.18", "newest")
def test_ranks_of_another_version(
    release: str, plugin_wheel: Path, other_version: Path, tmp_path: Path, transcripts: Transcripts
) -> None:
    """Each rank says once why it does not join; features travel by segment, and answers are right."""
    unpatched = transcripts.of(release, plain)
    environment = disposable_environment(release, plugin_wheel, tmp_path / "overlay")
    (environment.site_packages / "00_other_version.pth").write_text(OTHER_FIRST.format(path=str(other_version)))
    with WatchedServer(release, environment=environment) as server:
        answers = [asking.tokens(ask(server)) for ask in ANSWERED.values()]
        assert answers == [answer["tokens"] for answer in unpatched["answers"].values()]
        stats = server_lanes.lane(server)
        assert stats.state == "waiting" and set(stats.fallbacks) == {"not_open"}
        asking.wait_for(lambda: server.log().count("mmlane: join failed") >= server.tp, "each rank's line")
        lines = re.findall(r"mmlane: join failed: (.*)", server.log())
        assert len(lines) == server.tp, lines
        assert all("run one version of mmlane" in line for line in lines), lines
