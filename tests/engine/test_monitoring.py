"""docs/monitoring with a real Prometheus that scrapes a real engine: queries find their series, and alerts fire.

What the Prometheus has recorded stays in the test's directory, and `python -m tools.dashboard_image` draws it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from devkit.images import jpeg
from mmlane.lane.status import StatusError
from tests.engine import asking, server_lanes
from tests.engine.test_failures import failing, one
from tests.engine.watching import WatchedServer
from tools import monitoring, prometheus
from tools.prometheus import Prometheus

pytestmark = [
    pytest.mark.engine,
    pytest.mark.matrix,
    pytest.mark.releases("newest", "0.5.9"),
    pytest.mark.skipif(bool(prometheus.missing()), reason=prometheus.missing()),
]

LANE_MB = 16  # room for the features of eight images
# No series of these: it has one node.
NOT_HERE = {"mmlane_node_bytes_total"}


@contextmanager
def watched(release: str, plugin: Path, directory: Path) -> Iterator[tuple[WatchedServer, Prometheus]]:
    with (
        WatchedServer(
            release,
            plugin=plugin,
            probes=["failures", "control"],
            args=["--enable-metrics"],
            env={"MMLANE_CAPACITY_MB": str(LANE_MB)},
        ) as server,
        Prometheus(directory, [urlsplit(server.url).netloc], monitoring.impatient_rules()) as scraping,
    ):
        yield server, scraping


def firing(scraping: Prometheus) -> set[tuple[str, str]]:
    """The alerts that fire, each with the label that tells it from others of its name."""
    found = [alert["labels"] for alert in scraping.firing()]
    return {(labels["alertname"], labels.get("where") or labels.get("cause") or "") for labels in found}


def wait_for_alerts(scraping: Prometheus, *wanted: tuple[str, str]) -> None:
    """Wait until these alerts fire, and no other."""
    asking.wait_for(lambda: firing(scraping) == set(wanted), lambda: f"{wanted}, not {firing(scraping)}")


JOIN, PUT = ("MmlaneFailure", "join"), ("MmlaneFailure", "put")
NOT_OPEN, NEARLY_FULL = ("MmlaneLaneNotOpen", ""), ("MmlaneLaneNearlyFull", "")
FULL, FAILED = ("MmlaneLaneFull", "full"), ("MmlaneLaneFailed", "")


def test_queries_and_alerts(release: str, plugin_wheel: Path, tmp_path: Path) -> None:
    with watched(release, plugin_wheel, tmp_path) as (server, scraping):
        asking.wait_for(lambda: scraping.query("mmlane_info"), "the first scrape")
        wait_for_alerts(scraping)

        with failing(server, "mmlane.lane.reader:Reader.join Injected scheduler_TP1"):
            assert one(server).status == 200
            wait_for_alerts(scraping, NOT_OPEN, JOIN)
        server_lanes.open_lanes(server)
        wait_for_alerts(scraping, JOIN)

        for seed in range(20):
            assert server.generate([jpeg(640, 480, seed=seed)], asking.TEXT).status == 200
        server_lanes.wait_for_baseline(server)
        every_query_finds_its_series(scraping)
        wait_for_alerts(scraping, JOIN)

        with asking.burst(server):
            wait_for_alerts(scraping, JOIN, FULL, NEARLY_FULL)
        server_lanes.wait_for_baseline(server)
        wait_for_alerts(scraping, JOIN, FULL)

        with failing(server, "mmlane.lane.producer:Lane.put Injected launch_server"):
            assert one(server).status == 200
        wait_for_alerts(scraping, JOIN, FULL, PUT)

        with failing(server, "mmlane.lane.control:Control._turn Injected launch_server"):
            assert one(server).status == 200
            with suppress(StatusError):  # the thread, which may sleep for a minute, wakes to answer, and fails
                server_lanes.lanes(server)
            wait_for_alerts(scraping, JOIN, FULL, PUT, FAILED)
        assert server_lanes.states(server) == {"failed": 1}
        assert one(server).status == 200  # by segment
        every_text_is_filled_in(scraping)


def every_query_finds_its_series(scraping: Prometheus) -> None:
    """Of the dashboard, and of what alerts compare: its metrics, by the labels that it wants."""

    def without() -> list[str]:
        return [
            f"{query.panel}: {query.expression}"
            for query in monitoring.queries()
            if not query.metrics & NOT_HERE and not scraping.query(query.expression)
        ]

    asking.wait_for(lambda: not without(), lambda: f"series for {without()}")
    for query in monitoring.queries():
        if query.metrics & NOT_HERE:
            assert scraping.query(query.expression) == []  # and Prometheus takes it
    rules = scraping.rules()
    assert {rule["name"] for rule in rules} == {
        rule.get("alert", rule.get("record")) for rule in monitoring.rules()
    }
    assert {(rule["name"], rule.get("lastError", "")) for rule in rules if rule["health"] != "ok"} == set()
    for state in ("failed", "opening"):
        assert [one["value"][1] for one in scraping.query(f'mmlane_lanes{{state="{state}"}}')] == ["0"]
    assert scraping.query("increase(mmlane_lost_tickets_total[10m])")[0]["value"][1] == "0"
    assert scraping.query("mmlane_used_bytes / mmlane_capacity_bytes")


def every_text_is_filled_in(scraping: Prometheus) -> None:
    """What a person is shown names the engine, and no text has an error of its template."""
    for alert in scraping.firing():
        texts = alert["annotations"]
        assert texts["summary"].startswith(alert["labels"]["instance"])
        assert not any(bad in text for text in texts.values() for bad in ("<no value>", "<error", "{{"))
