"""docs/monitoring with a real Prometheus and a real lane, without an engine: alerts fire, and queries find series.

tests/engine/test_monitoring.py does the same with the engine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")

from devkit.server import free_port
from tests.lane.harness.waiting import eventually
from tools import monitoring, prometheus
from tools.prometheus import Prometheus

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(prometheus.missing()), reason=prometheus.missing()),
]

FAILED, NOT_OPEN, NEARLY_FULL = "MmlaneLaneFailed", "MmlaneLaneNotOpen", "MmlaneLaneNearlyFull"
FULL, FAILURE = "MmlaneLaneFull", "MmlaneFailure"


class Lane:
    """The process of scraped_lane.py."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"

    def does(self, step: str) -> None:
        assert self.process.stdin is not None
        print(step, file=self.process.stdin, flush=True)
        self.finishes()

    def finishes(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def lane(checkout: Path) -> Iterator[Lane]:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.scraped_lane", str(port)],
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        found = Lane(process, port)
        found.finishes()
        yield found
        assert process.stdin is not None
        process.stdin.close()  # it ends then
        assert process.wait(60) == 0


def wait_for(scraping: Prometheus, *alerts: str) -> None:
    """Wait until these alerts fire, and no other."""
    eventually(lambda: {alert["labels"]["alertname"] for alert in scraping.firing()} == set(alerts), str(alerts))


def test_alerts_fire_while_there_is_reason(tmp_path: Path, checkout: Path) -> None:
    with (
        lane(checkout) as scraped,
        Prometheus(tmp_path, [scraped.address], monitoring.impatient_rules()) as scraping,
    ):
        eventually(lambda: scraping.query("mmlane_info"), "the first scrape")
        wait_for(scraping)
        scraped.does("first_feature")
        wait_for(scraping, NOT_OPEN)
        scraped.does("join")
        wait_for(scraping)
        scraped.does("features")
        queries_find_their_series(scraping)
        wait_for(scraping)
        scraped.does("burst")
        wait_for(scraping, FULL, NEARLY_FULL)
        scraped.does("take")
        wait_for(scraping, FULL)
        scraped.does("error")
        wait_for(scraping, FULL, FAILURE)
        scraped.does("end")
        wait_for(scraping, FULL, FAILURE, FAILED)


def queries_find_their_series(scraping: Prometheus) -> None:
    """All of the dashboard but those of what has not happened."""
    not_yet = {"mmlane_node_bytes_total", "mmlane_failures_total"}
    for query in monitoring.queries():
        found = scraping.query(query.expression)  # which raises where Prometheus does not take it
        if query.metrics and not query.metrics & not_yet:
            assert found or eventually(partial(scraping.query, query.expression), query.expression)
    assert {rule["name"]: rule["health"] for rule in scraping.rules()} == {
        rule.get("alert") or rule["record"]: "ok" for rule in monitoring.rules()
    }
