"""docs/monitoring: the dashboard and the alerts use what mmlane exports, and promtool tests the alerts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

pytest.importorskip("torch")

from mmlane.lane.errors import Cause
from mmlane.transport import metrics
from mmlane.transport.lane import STATES
from tools import monitoring

DOCS = monitoring.DIRECTORY.parent
TEXTS = [query.expression for query in monitoring.queries()] + [rule["expr"] for rule in monitoring.rules()]

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool on PATH (Debian: apt-get install prometheus)"
)


def exported() -> set[str]:
    """The names that a scrape has, without the former ones."""
    return {
        f"{metric.name}_total" if metric.type == "counter" else metric.name
        for metric in metrics.REGISTRY.collect()
        if not metric.documentation.startswith("Deprecated")
    }


def values_of(label: str, text: str) -> set[str]:
    """What an expression compares a label with."""
    found = re.findall(rf'\b{label}\s*(?:=|!=|=~|!~)\s*"([^"]*)"', text)
    return {value for one in found for value in one.split("|")}


@pytest.mark.parametrize("text", TEXTS)
def test_metrics_and_labels_are_those_that_mmlane_exports(text: str) -> None:
    assert monitoring.metrics_in(text) <= exported()
    assert values_of("state", text) <= set(STATES)
    assert values_of("cause", text) <= set(get_args(Cause))
    assert values_of("direction", text) <= {"sent", "received"}
    assert values_of("where", text) <= {"nodes"}


def test_a_place_of_failures_that_alerts_tell_apart_is_one_in_the_code() -> None:
    assert 'failed("nodes"' in (DOCS.parent / "plugin/mmlane/transport/crossing.py").read_text()


def test_the_dashboard_shows_all_metrics() -> None:
    assert set().union(*(query.metrics for query in monitoring.queries())) == exported()


def test_what_alerts_take_from_recorded_series_is_recorded() -> None:
    used = {name for text in TEXTS for name in re.findall(r"\w+:\w+:\w+", text)}
    assert used == {rule["record"] for rule in monitoring.rules() if "record" in rule}


def test_panels_have_places_of_their_own() -> None:
    panels = monitoring.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("name", monitoring.alerts())
def test_an_alert_says_what_follows_and_where_to_read_on(name: str) -> None:
    annotations = monitoring.alerts()[name]["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    document, _, anchor = annotations["runbook_url"].partition("#")
    headings = re.findall(r"^##+ (.*)$", (DOCS.parent / document).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    for line in re.findall(r'(?<!--)"([a-z][^"{]*)"', annotations["description"]):
        if " " in line and line != "mmlane status":  # a line of the log
            assert any(line in (DOCS / page).read_text() for page in ("troubleshooting.md", "nodes.md")), line


def test_the_page_tells_of_each_alert() -> None:
    page = (DOCS / "monitoring.md").read_text()
    assert re.findall(r"^\| `(Mmlane\w+)`", page, re.MULTILINE) == list(monitoring.alerts())
    for mentioned in re.findall(r"`(mmlane_\w+)", page):
        assert mentioned in exported()


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", "--lint-fatal", monitoring.ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_on_faults_and_not_without() -> None:
    done = promtool("test", "rules", monitoring.ALERTS_TEST)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1)"])
@pytest.mark.parametrize("name", monitoring.alerts())
def test_those_tests_see_an_alert_that_never_fires_or_always(name: str, expression: str, tmp_path: Path) -> None:
    groups = yaml.safe_load(monitoring.ALERTS.read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        if rule.get("alert") == name:
            rule["expr"] = expression
    (tmp_path / monitoring.ALERTS.name).write_text(yaml.safe_dump({"groups": groups}))
    shutil.copy(monitoring.ALERTS_TEST, tmp_path)
    assert promtool("test", "rules", tmp_path / monitoring.ALERTS_TEST.name).returncode == 1


def test_the_engine_test_waits_for_nothing_but_the_condition() -> None:
    groups = yaml.safe_load(monitoring.impatient_rules())["groups"]
    found = {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}
    for name, rule in monitoring.alerts().items():
        assert found[name] == {key: value for key, value in rule.items() if key != "for"}
