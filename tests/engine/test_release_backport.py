"""Each release with the back-ports alone, and the faults that they mend in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import mmlane_patches
from mmlane import compat
from mmlane.engine import Engine
from mmlane.settings import Settings
from tests.engine import asking
from tests.engine.faults import DEFERRED, FANNED_OUT, ISOLATED
from tests.engine.watching import WatchedServer

pytestmark = pytest.mark.engine


# --- without the plugin: the faults ---


def test_unpatched_ranks_wait_for_each_other(version: str, unpatched: Any) -> None:
    assert unpatched["ranks wait for each other"] == (Version(version) >= DEFERRED)


def test_unpatched_one_image_with_n_3(version: str, unpatched: Any) -> None:
    """It ends the engine, or is answered."""
    found = unpatched["one image, n=3"]
    assert found["survived"] == ("tokens" in found) == (Version(version) >= FANNED_OUT)


def test_unpatched_several_images_with_n_2(unpatched: Any) -> None:
    assert unpatched["several images, n=2"] == {"status": 400, "names image_data": True}


def test_unpatched_lost_segment(version: str, unpatched: Any) -> None:
    assert unpatched["lost segment"] == {"answered": False, "survived": Version(version) >= ISOLATED}


# --- with the plugin ---


def test_the_report_agrees_with_the_table(version: str, backport_server: WatchedServer) -> None:
    specs, problems = compat.contributed(mmlane_patches)
    decisions = compat.plan(specs, Engine(Version(version), None), Settings(mode="backport"))
    lines = backport_server.log().splitlines()
    block = [line.partition("mmlane: ")[2] for line in lines if line.startswith("mmlane: ")]
    (applied,) = [line for line in block if line.startswith("  applied:")]
    (native,) = [line for line in block if line.startswith("  native:")]
    assert applied == "  applied: " + ", ".join(i for i, d in decisions.items() if d.state == "planned")
    assert native == "  native:  " + (", ".join(i for i, d in decisions.items() if d.state == "native") or "none")
    assert not any("skipped" in line for line in block if not re.match(r"\[\d+\]", line)), block
    assert problems == ()


def test_every_process_reports(version: str, backport_server: WatchedServer) -> None:
    lines = re.findall(r"mmlane: \[(\d+)\] (\w+): sglang (\S+), .*?; skipped (\w+)", backport_server.log())
    roles = sorted(role for _, role, _, _ in lines)
    assert roles == ["detokenizer", "main", "scheduler", "scheduler"]
    assert {(found, skipped) for _, _, found, skipped in lines} == {(version, "lane")}  # not of this mode
    pids = {int(pid) for pid, *_ in lines}
    assert pids <= {process.pid for process in backport_server.processes()}


def test_a_lost_segment_fails_a_streamed_request_too(backport_server: WatchedServer) -> None:
    backport_server.loses()
    with asking.schedulers_stopped(backport_server):
        before = asking.segments(backport_server)
        events = asking.in_background(lambda: list(backport_server.stream([asking.image(8)], asking.TEXT)))
        asking.wait_for(lambda: bool(set(asking.segments(backport_server)) - set(before)), "the segment")
        for name in set(asking.segments(backport_server)) - set(before):
            Path("/proc", str(backport_server.pid), "root/dev/shm", name).unlink()
    try:
        last = events.result(asking.WAIT_S)[-1]
    except RuntimeError as error:  # a status instead of a stream
        assert str(error).startswith("500")
    else:
        assert "500" in str(last)
    assert asking.ANSWERED["text only"](backport_server).status == 200
