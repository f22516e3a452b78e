"""tools/site.py: links that are right on a forge are right in the site."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mkdocs.exceptions import PluginError

from tools.site import linked

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "link", "wanted"),
    [
        ("README.md", "[lane](docs/lane.md#use)", "[lane](lane.md#use)"),
        ("README.md", "![plot](docs/images/gpu-h100.png)", "![plot](images/gpu-h100.png)"),
        ("README.md", "[up](#limits), [web](https://example.org/docs/x.md)", None),
        ("docs/lane.md", "[on GPUs](gpu.md#figures)", None),
        ("docs/lane.md", "[`example`](lane_example.py)", None),
        ("README.md", "[all pages](docs/index.md)", "[all pages](contents.md)"),
        ("docs/index.md", "[the overview](../README.md)", "[the overview](index.md)"),
        ("docs/index.md", "[steps](../CONTRIBUTING.md#style)", "[steps](contributing.md#style)"),
        ("docs/gpu.md", "[`bench/gpu`](../bench/gpu/__init__.py) measures", "`bench/gpu` measures"),
        ("CONTRIBUTING.md", "[devkit](devkit/README.md)", "devkit"),
        ("docs/lane.md", "```text\n[not](a-link.md)\n```", None),
    ],
)
def test_a_link(name: str, link: str, wanted: str | None) -> None:
    assert linked(link, name, None) == (wanted or link)


def test_a_link_into_the_repository_once_its_address_is_known() -> None:
    text = linked("[bench](../bench/gpu/__init__.py)", "docs/gpu.md", "https://example.org/mmlane/")
    assert text == "[bench](https://example.org/mmlane/blob/main/bench/gpu/__init__.py)"


def test_a_link_to_a_file_that_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"docs/gpu\.md: a link to \.\./bench/none\.py, which does not exist"):
        linked("[bench](../bench/none.py)", "docs/gpu.md", None)


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environ = {"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environ)


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(CHECKOUT, tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "contents.html", "contributing.html", "changelog.html", "lane.html"} <= pages.keys()
    for name, page in pages.items():
        loads = [part for part in page.split("<") if part.startswith(("script", "link", "img", "iframe"))]
        assert not [part for part in loads if "//" in part.partition(">")[0]], name


def test_a_broken_link_and_a_page_that_is_not_in_the_menu_fail_the_build(tmp_path: Path) -> None:
    for entry in CHECKOUT.iterdir():
        if entry.name != "docs":
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(CHECKOUT / "docs", tmp_path / "docs")
    (tmp_path / "docs/lost.md").write_text("[nowhere](lane.md#no-such-anchor)\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "does not contain an anchor '#no-such-anchor'" in done.stderr and "- lost.md" in done.stderr
