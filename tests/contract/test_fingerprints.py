"""Bodies that patches replace or lean on: each is one that a person has read."""

from __future__ import annotations

import ast

import pytest
from packaging.version import Version

from mmlane.compat import matrix
from mmlane.engine import Engine
from mmlane.engine.source import EngineSource
from tools import bodies
from tools.releases import our_patches

RECORD = bodies.load()
COMMAND = "read them again, then run `python -m tools.fingerprints`"


def test_bodies_are_as_recorded(engine: Engine, source: EngineSource) -> None:
    now = bodies.bodies(source, bodies.all_paths(our_patches()))
    told = bodies.differences(bodies.recorded(RECORD, engine.version), now)
    lines = [f"{engine.version}: {path}: {what}" for path, what in told.items()]
    assert not lines, "\n".join([*lines, COMMAND])


def test_the_record_holds_just_what_is_wanted() -> None:
    assert sorted(RECORD) == bodies.all_paths(our_patches()), COMMAND
    for path, changes in RECORD.items():
        assert any(changes.values()), f"{path} is on no release"
        assert {Version(since) for since in changes} <= set(matrix().engines), COMMAND


def test_every_patch_says_what_it_relies_on() -> None:
    assert all(spec.relies_on for spec in our_patches())


ORIGINAL = """
def wrap(obj, mode: str = "cpu"):
    for item in obj.items:
        item.feature = pointer(item.feature, mode)  # by pointer
    return obj
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # by pointer", "", True),
        (": str", "", True),
        ("    for", "    'Wrap it.'\n    for", True),
        ("):", ") -> object:", True),
        ("(item.feature, mode)", "(\n item.feature,\n mode,\n )", True),
        ('"cpu"', '"cuda"', False),
        ("def wrap", "@cached\ndef wrap", False),
        ("obj, mode", "obj, *, mode", False),
        ("return obj", "return None", False),
        ("item.feature, mode", "mode, item.feature", False),
    ],
)
def test_what_changes_a_fingerprint(old: str, new: str, same: bool) -> None:
    assert old in ORIGINAL
    before, now = (ast.parse(text).body[0] for text in (ORIGINAL, ORIGINAL.replace(old, new)))
    assert (bodies.fingerprint(before) == bodies.fingerprint(now)) is same


def test_fingerprints_do_not_depend_on_the_interpreter() -> None:
    """The record is read by people on other Pythons than the one that wrote it."""
    assert bodies.fingerprint(ast.parse(ORIGINAL).body[0]) == "94b2191b36f8"


def test_record_and_reading_it_back() -> None:
    old, mid, new = (Version(v) for v in ("0.5.9", "0.5.10", "0.5.11"))
    found: dict[Version, bodies.Bodies] = {
        old: {"a": "1", "b": None},
        mid: {"a": "1", "b": "2"},
        new: {"a": None, "b": "3"},
    }
    record = bodies.summarize(found)
    assert record == {"a": {"0.5.9": "1", "0.5.11": None}, "b": {"0.5.10": "2", "0.5.11": "3"}}
    for version, there in found.items():
        assert bodies.recorded(record, version) == there
    assert bodies.recorded(record, Version("0.5.10.post1")) == found[mid]
    assert bodies.differences(found[old], found[new]) == {"a": "gone", "b": "new"}
    assert bodies.differences(found[mid], found[new]) == {"a": "gone", "b": "changed"}
