"""A zip application with mmlane and all that it requires, as pip and zipapp make one."""

from __future__ import annotations

import sys
import zipapp
from pathlib import Path

import pytest

from mmlane import __version__
from tests.install.environments import Place, Way, pip


class Application(Way):
    """An environment without mmlane, whose Python runs the application."""

    def install(self) -> None:
        app = self.place.root / "app"
        pip(Path(sys.executable), "install", "--target", str(app), str(self.place.wheel))
        zipapp.create_archive(app, self.file(), main="mmlane.cli:main")

    def file(self) -> Path:
        return self.place.root / "app.pyz"


@pytest.mark.matrix
def test_a_zip_application_serves(tmp_path: Path, plugin_wheel: Path, checkout: Path) -> None:
    package = tmp_path / "engine" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(
        "if __name__ == '__main__':\n  import mmlane.entry, sys\n  print(mmlane.entry.session.trigger, sys.argv)\n"
    )
    place = tmp_path / "place"
    place.mkdir()
    way = Application(Place(place, plugin_wheel, checkout, (package.parent,)))
    way.install()
    version = way.run("-I", str(way.file()), "--version")
    assert (version.returncode, version.stdout) == (0, f"mmlane {__version__}\n"), version.stderr
    served = way.run("-I", str(way.file()), "serve", "--tp", "2")
    assert served.stdout == "startup hook ['mmlane serve', '--tp', '2']\n", served.stderr
