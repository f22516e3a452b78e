"""docs/how-it-works.md names functions and classes on an image's way: each of them exists."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from devkit.wheels import wheel_source
from mmlane.compat import matrix
from mmlane.engine.source import EngineSource

pytest.importorskip("torch")

TEXT = Path(__file__).parents[2].joinpath("docs/how-it-works.md").read_text(encoding="utf-8")
WAY = TEXT.partition("## One image's way\n")[2].partition("\n## ")[0]
LINES = re.findall(r"^(engine|mmlane) {3,}([\w.]+)", WAY, re.MULTILINE)
PLACES = ("tokenizer_manager", "scheduler", "mm_utils", "scheduler_components.request_receiver")


def test_all_ways_are_told() -> None:
    assert len(WAY.split("```text")) == 4 and len(LINES) > 20


@pytest.mark.parametrize("name", [name for whose, name in LINES if whose == "mmlane"])
def test_a_name_of_ours_exists(name: str) -> None:
    assert pkgutil.resolve_name(f"mmlane.transport.{name}") is not None


@pytest.mark.parametrize("name", [name for whose, name in LINES if whose == "engine"])
def test_a_name_of_the_engine_exists_on_the_newest_release(name: str) -> None:
    source = EngineSource(wheel_source(str(matrix().newest)))
    assert any(source.find(f"sglang.srt.managers.{module}", name) for module in PLACES)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:plugin|tests)/[\w/]+\.py)`", WAY))))
def test_a_file_that_is_named_exists(path: str) -> None:
    assert Path(__file__).parents[2].joinpath(path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+|[a-z]\w*_\w+|slot|arrivals)`", WAY))))
def test_a_word_in_the_text_is_a_name_in_the_transport(name: str) -> None:
    import mmlane.transport

    modules = [found.name for found in pkgutil.iter_modules(mmlane.transport.__path__)]
    assert any(hasattr(importlib.import_module(f"mmlane.transport.{module}"), name) for module in modules)
