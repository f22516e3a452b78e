"""What docs/monitoring has, as data: the dashboard's queries and the alert rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "monitoring"
DASHBOARD, ALERTS, ALERTS_TEST = (
    DIRECTORY / name for name in ("dashboard.json", "alerts.yaml", "alerts_test.yaml")
)
_METRIC = re.compile(r"(?<![:\w])mmlane_\w+(?![\w:])")  # the names of recorded series have colons
_VARIABLES = {"$instance": ".+", "$__rate_interval": "10s"}  # as Grafana fills them in: all engines


@dataclass(frozen=True)
class Query:
    """One of the dashboard, by the title of its panel, with Grafana's variables filled in."""

    panel: str
    expression: str
    legend: str
    unit: str
    is_stacked: bool

    @property
    def metrics(self) -> set[str]:
        """Names of mmlane's metrics in it."""
        return metrics_in(self.expression)


def metrics_in(expression: str) -> set[str]:
    """Names of mmlane's metrics in a PromQL expression."""
    return set(_METRIC.findall(expression))


def dashboard() -> Any:
    """The dashboard, as Grafana imports it."""
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def queries() -> list[Query]:
    """All queries of the dashboard, in the order of its panels."""
    return [
        Query(
            panel["title"],
            _filled_in(target["expr"]),
            target["legendFormat"],
            panel["fieldConfig"]["defaults"].get("unit", ""),
            "stacking" in panel["fieldConfig"]["defaults"].get("custom", {}),
        )
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


def _filled_in(expression: str) -> str:
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def rules() -> list[dict[str, Any]]:
    """All rules: those that record and the alerts."""
    return [rule for group in _groups() for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts, by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def impatient_rules() -> str:
    """The text of the rules with alerts that fire as soon as their condition holds."""

    def groups() -> Iterator[dict[str, Any]]:
        for group in _groups():
            yield {**group, "rules": [{k: v for k, v in rule.items() if k != "for"} for rule in group["rules"]]}

    return yaml.safe_dump({"groups": list(groups())})


def _groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return found
