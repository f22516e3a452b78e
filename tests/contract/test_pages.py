"""What the pages on operations show is valid: manifest, unit, arithmetic; and the list has all pages."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DOCS = Path(__file__).parents[2] / "docs"


def block(page: str, language: str) -> str:
    """The one block of that language on a page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return str(found)


def test_the_manifest_is_one_that_kubernetes_takes() -> None:
    manifest = yaml.safe_load(block("kubernetes.md", "yaml"))
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    pod = manifest["spec"]["template"]["spec"]
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    manifest["spec"]["template"]["spec"]["volumes"][0]["emptyDir"]["size"] = "2Gi"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    for command in ("python", "mmlane"):
        (tmp_path / command).symlink_to(sys.executable)
    unit = tmp_path / "sglang.service"
    unit.write_text(block("systemd.md", "ini").replace("/opt/sglang/bin", str(tmp_path)))
    verify = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])
    unit.write_text(unit.read_text() + "MemoryMaximum=1\n")
    assert "MemoryMaximum" in subprocess.run(verify, capture_output=True, text=True).stderr


def test_the_example_of_sizing_is_right() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block("sizing.md", "python"), {})
    assert printed.getvalue() == block("sizing.md", "text")


def test_the_figures_in_the_text_on_sizing_are_those_of_the_example() -> None:
    names: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block("sizing.md", "python"), names)
    text = (DOCS / "sizing.md").read_text(encoding="utf-8")
    assert f"{names['in_flight'] / 1024:.1f} GiB are in flight" in text
    assert f"which hold {int(1024 // names['image'])} of these images" in text
    (pinned,) = {int(found) for found in re.findall(r"set `MMLANE_PINNED_MB=(\d+)`", text)}
    assert names["in_flight"] <= pinned < names["in_flight"] + 128


def test_each_page_is_in_the_list_and_the_list_has_no_others() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"index.md"}
