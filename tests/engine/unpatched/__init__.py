"""What is done to releases without the plugin, a scenario a file; transcripts.py keeps what they did."""

from __future__ import annotations

import importlib
import pkgutil

from tests.engine.transcripts import SCENARIOS, Scenario


def every_scenario() -> list[Scenario]:
    """Those of all modules here."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return list(SCENARIOS.values())
