"""The engine's `--config FILE`: what reads it is where mmlane looks for it, and passes over mmlane's keys."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mmlane.engine import Engine
from mmlane.engine.source import EngineSource
from mmlane.entry import CONFIG_MODULES, config_target, hide_in
from mmlane.flags import flags_in_config, take_flags
from mmlane.patching import check

CONFIG = """
tp: 2
mmlane: off
mmlane-disable: [fan_out, ipc_lock]
mmlane_strict: true
log-requests: true
"""


@pytest.fixture
def name(source: EngineSource) -> str:
    """Each release has one of the two modules."""
    (found,) = [module for module in CONFIG_MODULES if source.file(module) is not None]
    return found


@pytest.fixture
def merger(source: EngineSource, name: str) -> Iterator[Any]:
    """The engine's class, imported from the wheel: its file needs nothing else of the engine."""
    module = _imported(source, name)
    sys.modules[name] = module
    yield module.ConfigArgumentMerger(_parser())
    del sys.modules[name]


def _imported(source: EngineSource, name: str) -> ModuleType:
    file = source.file(name)
    assert file is not None
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int)
    parser.add_argument("--log-requests", action="store_true")
    parser.add_argument("--config")
    return parser


def test_the_reader_is_what_is_expected(engine: Engine, source: EngineSource, name: str) -> None:
    check(config_target(name), source)


def test_the_engine_reads_the_file_that_its_command_line_names(engine: Engine, source: EngineSource) -> None:
    """`prepare_server_args` asks the merger, and imports it only then."""
    node = source.find("sglang.srt.server_args", "prepare_server_args")
    assert node is not None
    body = ast.unparse(node)
    assert "if '--config' in argv" in body and "import ConfigArgumentMerger" in body


def test_our_keys_hold_and_the_engine_gets_the_others(merger: Any, name: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(CONFIG)
    argv = ["--config", str(file), "--mmlane-disable", "tp_barrier", "--tp", "4"]
    environ = {"MMLANE": "lane"}
    take_flags(argv, environ, flags_in_config(argv))
    assert environ == {"MMLANE": "off", "MMLANE_DISABLE": "tp_barrier", "MMLANE_STRICT": "1"}
    assert "--mmlane" in merger.merge_config_with_args(argv)  # so without us it would refuse its file
    hide_in(sys.modules[name])
    merged = merger.merge_config_with_args(argv)
    assert merged == ["--tp", "2", "--log-requests", "--tp", "4"]
    assert vars(_parser().parse_args(merged)) == {"tp": 4, "log_requests": True, "config": None}


@pytest.mark.parametrize("text", ["mmlane: [", "- mmlane", "mmlane: !!python/name:os.name ''"])
def test_a_broken_file_is_the_engines_to_report(merger: Any, name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    argv = ["--config", str(file)]
    assert flags_in_config(argv) == []
    hide_in(sys.modules[name])
    with pytest.raises((ValueError, yaml.YAMLError)):
        merger.merge_config_with_args(argv)
