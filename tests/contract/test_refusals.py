"""The checker can fail: engines that were changed by hand are refused, and the report says what was found."""

from __future__ import annotations

import ast
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

from mmlane.compat import matrix, plan
from mmlane.engine import Engine
from mmlane.engine.source import EngineSource, defined
from mmlane.patching import PatchSpec, Target
from mmlane.settings import Settings
from tools.releases import our_patches, release

# One release for each shape that the targets have.
RELEASES = ("0.5.9", "0.5.12.post1", "0.5.14", "0.5.20", str(matrix().newest))
Mutation = Callable[[Path, Target], str]


def rename_a_parameter(file: Path, target: Target) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    *_, node = _down(tree, target.name)
    if isinstance(node, ast.ClassDef):
        *_, node = _down(node, "__init__")
    if isinstance(node, ast.Assign):
        node.value = ast.Constant("renamed_by_test")
    else:
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        node.args.args[-1].arg = "renamed_by_test"
    file.write_text(ast.unparse(tree), encoding="utf-8")
    return "renamed_by_test"


def remove_the_definition(file: Path, target: Target) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    *_, owner, node = _down(tree, target.name)
    body = owner.body  # type: ignore[attr-defined]
    body[body.index(node)] = ast.Pass()
    file.write_text(ast.unparse(tree), encoding="utf-8")
    return "found no such name in it"


def remove_the_module(file: Path, target: Target) -> str:
    file.unlink()
    return "found no such module"


@pytest.mark.parametrize("mutate", [rename_a_parameter, remove_the_definition, remove_the_module])
@pytest.mark.parametrize("number", RELEASES)
def test_a_changed_engine_is_refused(number: str, mutate: Mutation, tmp_path: Path) -> None:
    """Each target in turn: its group is skipped whole, with what needs it, and says why; all others go ahead."""
    real = release(Version(number))
    specs = [spec for spec in our_patches() if _applies(spec, real.version)]
    targets = {target.path: target for spec in specs for target in spec.targets_on(real.version)}
    assert targets, "nothing to try on this release"
    for path, target in targets.items():
        engine = _copy(real, list(targets.values()), tmp_path / path)
        assert engine.source is not None
        file = engine.source.file(target.module)
        assert file is not None
        found = mutate(file, target)
        decisions = plan(specs, engine, Settings())
        hit = {s.group for s in specs if any(_is_hit(t, target, mutate) for t in s.targets_on(real.version))}
        lost = {spec.id for spec in specs if spec.group in hit}
        for spec in specs:
            decision = decisions[spec.id]
            if spec.id in lost or spec.needs & lost:
                assert decision.state == "skipped"
                assert "wanted sglang.srt." in decision.reason
                assert found in decision.reason
            else:
                assert decision.state == "planned"


def test_a_group_mate_says_whom_it_needs(tmp_path: Path) -> None:
    """On 0.5.9 the receive group has several patches: those that were not refused name the one that was."""
    real = release(Version("0.5.9"))
    specs = [spec for spec in our_patches() if spec.group == "receive"]
    targets = [target for spec in specs for target in spec.targets_on(real.version)]
    engine = _copy(real, targets, tmp_path)
    pointer = next(target for target in targets if target.name == "ShmPointerMMData")
    assert engine.source is not None
    file = engine.source.file(pointer.module)
    assert file is not None
    rename_a_parameter(file, pointer)
    reasons = {id: decision.explanation for id, decision in plan(specs, engine, Settings()).items()}
    assert reasons.pop("shm_pointer").startswith(f"wanted {pointer.path}(self, tensor)")
    assert reasons
    assert all(reason.startswith("needs shm_pointer: wanted ") for reason in reasons.values())


def _applies(spec: PatchSpec, version: Version) -> bool:
    cell = spec.cell(version)
    return cell is not None and cell.state == "apply"


def _is_hit(target: Target, changed: Target, mutate: Mutation) -> bool:
    """Whether changing one target also takes away another one."""
    if mutate is remove_the_module:
        return target.module == changed.module
    if mutate is remove_the_definition:
        return f"{target.path}.".startswith(f"{changed.path}.")
    return target.path == changed.path


def _copy(real: Engine, targets: list[Target], root: Path) -> Engine:
    """An engine to be changed: the classes and functions of these targets, with empty bodies."""
    assert real.root is not None and real.source is not None
    for module in {target.module for target in targets}:
        file = real.source.file(module)
        assert file is not None
        names = {target.name.split(".")[0] for target in targets if target.module == module}
        copy = root / file.relative_to(real.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(_skeleton(real.source, module, name) for name in sorted(names)))
    return Engine(real.version, root)


@cache
def _skeleton(source: EngineSource, module: str, name: str) -> str:
    node = source.find(module, name)
    assert node is not None
    bare = deepcopy(node)
    for inner in ast.walk(bare):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            inner.body = [ast.Pass()]
    return ast.unparse(bare) + "\n"


def _down(node: ast.AST, name: str) -> list[ast.AST]:
    """The definitions on the way to a dotted name, starting with `node`."""
    way = [node]
    for part in name.split("."):
        way.append(next(n for n in way[-1].body if part in defined(n)))  # type: ignore[attr-defined]
    return way


def test_the_copy_is_good(tmp_path: Path) -> None:
    """Without a change the copied engine is accepted, so that it is the change that was refused above."""
    for number in RELEASES:
        real = release(Version(number))
        specs = [spec for spec in our_patches() if _applies(spec, real.version)]
        targets = [target for spec in specs for target in spec.targets_on(real.version)]
        copied = _copy(real, targets, tmp_path / number)
        assert copied.root is not None
        assert isinstance(copied.source, EngineSource)
        assert {decision.state for decision in plan(specs, copied, Settings()).values()} == {"planned"}
