"""Patching as a mechanism: check, apply, verify, undo, groups, and another plugin's replacement.

What is patched here is a package of a few lines that the test writes; the engine's own objects are patched in
tests/contract (as source) and tests/engine (as a running server).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version

from mmlane.compat import plan
from mmlane.engine import Engine
from mmlane.engine.source import EngineSource
from mmlane.patching import Cell, Failure, Patcher, PatchSpec, Refusal, Target, apply, check, replaced_by
from mmlane.settings import Settings

DEFINING = """
class Thing:
    def __init__(self, a, b=None): self.a = a
    def method(self, x): return ("engine", x)
    @staticmethod
    def static(x): return ("engine", x)
def function(x, *, y=1): return ("engine", x)
PLACE = "/somewhere"
LIMIT: int = 3
OTHER = 3
computed = PLACE + "/else"
if LIMIT:
    PLACES = ("a", "b")
"""
USING = "from {package}.defining import LIMIT, OTHER, PLACE, Thing, function\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a freshly written package with a defining and a using module."""
    name = "sample_" + tmp_path.name.replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "defining.py").write_text(DEFINING)
    (tmp_path / name / "using.py").write_text(USING.format(package=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def shout(original: Callable[..., Any]) -> Callable[..., Any]:
    def shouted(*args: Any, **kwargs: Any) -> Any:
        return ("mmlane", original(*args, **kwargs))

    shouted.__wrapped__ = original  # type: ignore[attr-defined]
    return shouted


def spec(id: str, *targets: Target, group: str | None = None, state: str = "apply") -> PatchSpec:
    return PatchSpec(
        id=id,
        why="",
        consequence="something is worse",
        upstream=(),
        drop_when="",
        group=group or id,
        cells=(Cell(Version("1"), state, "because"),),  # type: ignore[arg-type]
        targets=targets,
    )


def target(package: str, name: str, signature: str = "(x, *, y=)", **kwargs: Any) -> Target:
    return Target(f"{package}.defining", name, signature, kwargs.pop("replace", shout), **kwargs)


def planned(package: str, tmp_path: Path, *specs: PatchSpec, settings: Settings | None = None) -> Patcher:
    return Patcher(plan(specs, Engine(Version("1.5"), tmp_path), settings or Settings()))


# --- check ---


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("function", "(x, *, y=)"),
        ("Thing", "(self, a, b=)"),
        ("Thing.method", "(self, x)"),
        ("Thing.static", "(x)"),
        ("PLACE", "'/somewhere'"),
        ("LIMIT", "3"),
        ("PLACES", "('a', 'b')"),
    ],
)
def test_check_accepts_what_is_there(package: str, tmp_path: Path, name: str, signature: str) -> None:
    check(target(package, name, signature), EngineSource(tmp_path))


@pytest.mark.parametrize(
    ("name", "signature", "found"),
    [
        ("function", "(x)", r"found \(x, \*, y=\)"),
        ("Thing", "(self, a)", r"found \(self, a, b=\)"),
        ("Thing.gone", "(self)", "found no such name in it"),
        ("gone", "(x)", "found no such name in it"),
        ("PLACE", "'/elsewhere'", " = '/elsewhere', found '/somewhere'"),
        ("PLACE", "(x)", "found '/somewhere'"),
        ("GONE", "3", " = 3, found no such name in it"),
        ("function", "3", r" = 3, found \(x, \*, y=\)"),
        ("computed", "'/somewhere/else'", r"found PLACE \+ '/else'"),
    ],
)
def test_check_names_what_was_wanted_and_found(
    package: str, tmp_path: Path, name: str, signature: str, found: str
) -> None:
    with pytest.raises(Refusal, match=f"wanted {package}.defining.{name}.*{found}"):
        check(target(package, name, signature), EngineSource(tmp_path))
    with pytest.raises(Refusal, match="no such module"):
        check(Target(f"{package}.absent", "x", "()", shout), EngineSource(tmp_path))


# --- apply and undo ---


@pytest.mark.parametrize("early", [True, False], ids=["using module first", "patch first"])
def test_apply_reaches_every_holder_and_undo_restores_the_very_objects(package: str, early: bool) -> None:
    defining = importlib.import_module(f"{package}.defining")
    using = importlib.import_module(f"{package}.using") if early else None
    before = defining.function
    replacement = apply(target(package, "function"), defining)
    using = using or importlib.import_module(f"{package}.using")
    assert defining.function is using.function is replacement.installed
    assert using.function(1) == ("mmlane", ("engine", 1))
    assert replacement.in_force()
    replacement.undo()
    assert defining.function is using.function is before
    assert not replacement.in_force()


def test_methods_static_methods_and_classes(package: str) -> None:
    defining = importlib.import_module(f"{package}.defining")
    using = importlib.import_module(f"{package}.using")
    thing = defining.Thing
    raw = dict(vars(thing))
    done = [
        apply(target(package, "Thing.method"), defining),
        apply(target(package, "Thing.static"), defining),
        apply(
            target(package, "Thing", replace=lambda c: type("Thing", (c,), {"__module__": c.__module__})), defining
        ),
    ]
    assert using.Thing is not thing
    assert using.Thing(1).method(2) == ("mmlane", ("engine", 2))
    assert using.Thing.static(3) == ("mmlane", ("engine", 3))
    for replacement in reversed(done):
        replacement.undo()
    assert using.Thing is defining.Thing is thing
    assert vars(thing)["method"] is raw["method"] and vars(thing)["static"] is raw["static"]


@pytest.mark.parametrize("early", [True, False], ids=["using module first", "patch first"])
@pytest.mark.parametrize(("name", "value"), [("PLACE", "/somewhere"), ("LIMIT", 3)])
def test_a_constant(package: str, name: str, value: object, early: bool) -> None:
    """A module that imported it by its name gets ours; a constant that merely has the same value (OTHER) stays."""
    defining = importlib.import_module(f"{package}.defining")
    using = importlib.import_module(f"{package}.using") if early else None
    replacement = apply(target(package, name, repr(value), replace=lambda original: [original]), defining)
    using = using or importlib.import_module(f"{package}.using")
    assert getattr(defining, name) == [value]
    assert getattr(using, name) is getattr(defining, name)
    assert defining.OTHER == using.OTHER == 3
    assert replacement.in_force()
    replacement.undo()
    assert getattr(defining, name) == getattr(using, name) == value
    assert not replacement.in_force()


def test_a_constant_that_another_plugin_has_set(package: str, tmp_path: Path) -> None:
    """Before us it stands, and ours is refused; after us it stands as well, and is named."""
    defining = importlib.import_module(f"{package}.defining")
    moves = spec("moves", target(package, "PLACE", "'/somewhere'", replace=lambda original: f"{original}/ours"))
    patcher = planned(package, tmp_path, moves)
    patcher.module_ready(defining)
    assert defining.PLACE == "/somewhere/ours"
    assert patcher.overridden() == []
    vars(defining)["PLACE"] = "/theirs"
    (line,) = map(str, patcher.overridden())
    assert "PLACE, patched by moves, has since been replaced by '/theirs'; so something is worse" in line
    patcher.undo()
    assert defining.PLACE == "/theirs"
    patcher.module_ready(defining)
    assert patcher.decisions["moves"].state == "skipped"
    assert patcher.decisions["moves"].reason.endswith("PLACE is already replaced by '/theirs'")
    assert defining.PLACE == "/theirs"


def test_constants_stack_and_their_source_tells_a_change(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    one, two = (
        spec(id, target(package, "PLACE", "'/somewhere'", replace=lambda original, id=id: f"{original}/{id}"))
        for id in ("one", "two")
    )
    patcher = planned(package, tmp_path, one, two)
    patcher.module_ready(defining)
    assert defining.PLACE == "/somewhere/one/two"
    patcher.undo()
    assert defining.PLACE == "/somewhere"
    gone = planned(package, tmp_path, spec("gone", target(package, "PLACE", "'/other'")))
    assert gone.decisions["gone"].reason.endswith("PLACE = '/other', found '/somewhere'")
    del defining.PLACE
    with pytest.raises(Refusal, match="found no PLACE there"):
        apply(target(package, "PLACE", "'/somewhere'"), defining)


def test_a_group_goes_in_whole_or_not_at_all(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    before = dict(vars(defining))
    good = spec("good", target(package, "function"), group="g")
    bad = spec("bad", target(package, "Thing", "(self, other)"), group="g")
    alone = spec("alone", target(package, "Thing.method", "(self, x)"))
    patcher = planned(package, tmp_path, good, bad, alone)
    patcher.module_ready(defining)
    assert {i: d.state for i, d in patcher.decisions.items()} == {
        "good": "skipped",
        "bad": "skipped",
        "alone": "applied",
    }
    assert "found (self, a, b=)" in patcher.decisions["bad"].reason
    assert patcher.decisions["good"].explanation.startswith("needs bad: wanted")
    assert defining.function is before["function"]


@pytest.mark.parametrize("early", [True, False])
def test_what_needs_another_patch_goes_with_it_and_not_the_other_way_round(
    package: str, tmp_path: Path, early: bool
) -> None:
    """Whether it turns out in the plan, or only when the module is there, that a patch cannot be applied."""
    wrong = target(package, "function", "(z)") if early else target(package, "function", replace=refuse)
    needed = spec("needed", wrong)
    needing = replace(spec("needing", target(package, "Thing.method", "(self, x)")), needs=frozenset({"needed"}))
    farther = replace(spec("farther", target(package, "Thing.static", "(x)")), needs=frozenset({"needing"}))
    patcher = planned(package, tmp_path, farther, needing, needed)
    patcher.module_ready(importlib.import_module(f"{package}.defining"))
    states = {id: (decision.state, decision.needs) for id, decision in patcher.decisions.items()}
    assert states == {
        "needed": ("skipped", ""),
        "needing": ("skipped", "needed"),
        "farther": ("skipped", "needed"),
    }

    patcher = planned(
        package, tmp_path, spec("needed", target(package, "function")), replace(needing, targets=(wrong,))
    )
    patcher.module_ready(importlib.import_module(f"{package}.defining"))
    assert {id: d.state for id, d in patcher.decisions.items()} == {"needed": "applied", "needing": "skipped"}


def refuse(original: Any) -> Any:
    raise Refusal("mine")


def test_a_patch_is_for_its_modes_only(package: str, tmp_path: Path) -> None:
    one = replace(spec("one", target(package, "function")), modes=frozenset({"lane"}))
    for mode, state in (("lane", "planned"), ("backport", "skipped")):
        decision = planned(package, tmp_path, one, settings=Settings(mode=mode)).decisions["one"]  # type: ignore[arg-type]
        assert (decision.state, decision.chosen) == (state, state == "skipped")


def test_a_group_is_undone_when_a_later_target_turns_out_to_be_taken(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    before = defining.function
    defining.Thing.method = lambda self, x: "another plugin"
    patcher = planned(
        package,
        tmp_path,
        spec("first", target(package, "function"), group="g"),
        spec("second", target(package, "Thing.method", "(self, x)"), group="g"),
    )
    patcher.module_ready(defining)
    assert defining.function is before
    for decision in patcher.decisions.values():
        assert decision.state == "skipped"
        assert "Thing.method is already replaced by" in decision.reason and __name__ in decision.reason
    assert defining.Thing(1).method(1) == "another plugin"


def test_a_later_wrapper_around_ours_is_kept_by_undo(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    replacement = apply(target(package, "function"), defining)
    outer = shout(defining.function)
    vars(defining)["function"] = outer
    assert replacement.in_force()
    replacement.undo()
    assert defining.function is outer


# As the engine's own registry hooks a target: also a replacement says that it wraps what it never calls.
HOOKS = """
import functools
def around(original, hook):
    @functools.wraps(original)
    def wrapper(*args, **kwargs): return hook(original, *args, **kwargs)
    return wrapper
def replace(original, hook):
    @functools.wraps(original)
    def wrapper(*args, **kwargs): return hook(*args, **kwargs)
    return wrapper
"""


@pytest.mark.parametrize(("kind", "in_force"), [("around", True), ("replace", False)])
def test_a_hook_of_another_plugin_on_ours(package: str, tmp_path: Path, kind: str, in_force: bool) -> None:
    (tmp_path / package / "srt").mkdir()
    (tmp_path / package / "srt" / "plugins.py").write_text(HOOKS)
    hooks = importlib.import_module(f"{package}.srt.plugins")
    defining = importlib.import_module(f"{package}.defining")
    replacement = apply(target(package, "function"), defining)
    vars(defining)["function"] = getattr(hooks, kind)(defining.function, a_plugins_hook)
    assert replacement.in_force() is in_force
    assert in_force or replacement.successor() == f"{__name__}.a_plugins_hook"


def a_plugins_hook(*args: Any, **kwargs: Any) -> Any:
    return ("another plugin", args)


def test_a_replacement_that_cannot_be_made_skips_its_group_alone(package: str, tmp_path: Path) -> None:
    def broken(original: Any) -> Any:
        raise ValueError("no such parameter")

    defining = importlib.import_module(f"{package}.defining")
    before = defining.function
    patcher = planned(
        package,
        tmp_path,
        spec("broken", target(package, "function", replace=broken)),
        spec("alone", target(package, "Thing.method", "(self, x)")),
    )
    patcher.module_ready(defining)
    assert {i: d.state for i, d in patcher.decisions.items()} == {"broken": "skipped", "alone": "applied"}
    assert "ValueError: no such parameter" in patcher.decisions["broken"].reason
    assert defining.function is before


def test_what_the_plan_names_is_loaded_at_once(package: str, tmp_path: Path) -> None:
    """Also for a module of the engine that is imported later; what cannot be loaded skips its group alone."""
    (tmp_path / package / "replacements.py").write_text("def first(f): return 1\ndef second(f): return 2\n")
    one = spec("one", target(package, "function", replace=f"{package}.replacements:first"))
    gone = spec("gone", target(package, "Thing.method", "(self, x)", replace=f"{package}.absent:shout"))
    patcher = planned(package, tmp_path, one, gone)
    patcher.load()
    assert {i: d.state for i, d in patcher.decisions.items()} == {"one": "planned", "gone": "skipped"}
    assert patcher.decisions["gone"].failed and not patcher.decisions["one"].failed
    (tmp_path / package / "replacements.py").unlink()
    defining = importlib.import_module(f"{package}.defining")
    patcher.module_ready(defining)
    assert defining.function == 1


def test_a_replaced_function_or_class_names_its_replacement(package: str) -> None:
    defining = importlib.import_module(f"{package}.defining")
    assert replaced_by(defining.function, defining) is None
    assert replaced_by(defining.Thing, defining) is None
    assert __name__ in str(replaced_by(shout(defining.function), defining))
    assert "Thing" in str(replaced_by(type("Thing", (), {"__module__": "elsewhere"}), defining))


@pytest.mark.parametrize("order", ["IAU", "AIU", "IAAU", "IAUAU", "AUIAU", "AIUA"])
def test_import_apply_and_undo_in_any_order(package: str, tmp_path: Path, order: str) -> None:
    """I: import the using module. A: apply. U: undo. After each step every holder agrees with the patcher."""
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    patcher = planned(package, tmp_path, spec("p", target(package, "function")))
    using: ModuleType | None = None
    for step in order:
        if step == "I":
            using = importlib.import_module(f"{package}.using")
        elif step == "A":
            patcher.module_ready(defining)
            once = defining.function
            patcher.module_ready(defining)
            assert defining.function is once is not original
        else:
            patcher.undo()
            assert defining.function is original
        if using is not None:
            assert using.function is defining.function


# --- plan ---


def test_disabled_and_native_and_too_old(package: str, tmp_path: Path) -> None:
    one, two = (
        spec("one", target(package, "function"), group="g"),
        spec("two", target(package, "function"), group="g"),
    )
    off = planned(package, tmp_path, one, two, settings=Settings(disable=frozenset({"one"})))
    assert [(d.state, d.chosen) for d in off.decisions.values()] == [("skipped", True), ("skipped", True)]
    native = planned(package, tmp_path, spec("n", target(package, "function"), state="native"))
    assert native.decisions["n"].state == "native"
    old = plan([one], Engine(Version("0.9"), tmp_path), Settings())
    assert old["one"].state == "skipped" and "older than 1" in old["one"].reason


def test_targets_and_cells_choose_by_version() -> None:
    t = Target("m", "n", "()", shout, since="1.2", before="1.4")
    assert [t.serves(Version(v)) for v in ("1.1", "1.2", "1.3.post1", "1.4.dev3", "1.4")] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("dropped", ["lower", "upper"])
def test_two_patches_on_one_target_stack_and_each_can_go(package: str, tmp_path: Path, dropped: str) -> None:
    """A patch wraps another's replacement; when a group turns out to be impossible, the other stays, alone."""
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    late = Target(f"{package}.using", "function", "(x, *, y=)", shout)  # imported, not defined there
    specs = {
        "lower": spec("lower", target(package, "function")),
        "upper": spec("upper", target(package, "function")),
    }
    patcher = planned(package, tmp_path, *specs.values())
    patcher.module_ready(defining)
    assert defining.function(1) == ("mmlane", ("mmlane", ("engine", 1)))
    assert patcher.overridden() == []

    def fails(original: Any) -> Any:
        raise RuntimeError("mine")

    patcher.decisions[dropped].targets += (Target(late.module, late.name, "", fails),)
    patcher.module_ready(importlib.import_module(f"{package}.using"))
    kept = ({"lower", "upper"} - {dropped}).pop()
    assert {i: d.state for i, d in patcher.decisions.items()} == {dropped: "skipped", kept: "applied"}
    assert defining.function(1) == ("mmlane", ("engine", 1))
    patcher.undo()
    assert defining.function is original


def test_a_class_method(package: str) -> None:
    defining = importlib.import_module(f"{package}.defining")
    defining.Thing.made = classmethod(eval(compile("lambda cls, x: (cls, x)", str(defining.__file__), "eval")))
    replacement = apply(target(package, "Thing.made", "(cls, x)"), defining)
    assert defining.Thing.made(1) == ("mmlane", (defining.Thing, 1))
    replacement.undo()
    assert defining.Thing.made(1) == (defining.Thing, 1)


# --- steps: one replacement for several patches ---


def in_turn(original: Callable[..., Any], steps: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    """Of a function: what its steps say, in their order, and then what it says itself."""

    def stepped(x: Any) -> Any:
        return (*(step(x) for step in steps), original(x))

    stepped.__wrapped__ = original  # type: ignore[attr-defined]
    return stepped


def first(x: Any) -> Any:
    return ("first", x)


def second(x: Any) -> Any:
    return ("second", x)


def step(package: str, step: Callable[..., Any] | str, **kwargs: Any) -> Target:
    """A target of a patch that wants a step in the one replacement."""
    return target(package, "function", replace=kwargs.pop("replace", in_turn), step=step, **kwargs)


def refused(package: str) -> Target:
    """A target that turns out to be impossible only when its module is there."""
    return target(package, "Thing.method", "(self, x)", replace=refuse)


def test_steps_of_several_patches_make_one_replacement(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    using = importlib.import_module(f"{package}.using")
    original = defining.function
    made: list[Any] = []

    def counted(original: Any, steps: Any) -> Any:
        made.append(in_turn(original, steps))
        return made[-1]

    one, two = (spec(s.__name__, step(package, s, replace=counted)) for s in (first, second))
    patcher = planned(package, tmp_path, one, two)
    patcher.module_ready(defining)
    patcher.module_ready(defining)
    assert made == [defining.function] and using.function is defining.function
    assert defining.function.__wrapped__ is original
    assert defining.function(1) == (("first", 1), ("second", 1), ("engine", 1))
    (of_one,), (of_two,) = (decision.replaced for decision in patcher.decisions.values())
    assert of_one is of_two and of_one.targets == [*one.targets, *two.targets]
    assert [d.state for d in patcher.decisions.values()] == ["applied", "applied"]
    assert patcher.overridden() == []
    patcher.undo()
    assert defining.function is using.function is original
    assert [(d.state, d.replaced) for d in patcher.decisions.values()] == [("planned", [])] * 2
    patcher.module_ready(defining)
    assert len(made) == 2
    assert using.function(2) == (("first", 2), ("second", 2), ("engine", 2))
    patcher.undo()
    assert defining.function is using.function is original


def test_the_order_of_steps_is_that_of_the_patches(package: str, tmp_path: Path) -> None:
    """And not that of their names, of their groups, or of where in a patch its target stands."""
    defining = importlib.import_module(f"{package}.defining")
    last = spec("a", target(package, "Thing.static", "(x)"), step(package, first), group="g")
    patcher = planned(package, tmp_path, spec("z", step(package, second), group="g"), last)
    patcher.module_ready(defining)
    assert defining.function(1) == (("second", 1), ("first", 1), ("engine", 1))


def test_a_step_that_several_patches_name_is_called_once(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    (tmp_path / package / "steps.py").write_text("def first(x): return ('first', x)\n")
    named = f"{package}.steps:first"
    specs = [
        spec("one", step(package, named)),
        spec("two", step(package, second)),
        spec("three", step(package, named)),
        spec("four", step(package, second, replace=in_turn)),
    ]
    patcher = planned(package, tmp_path, *specs)
    patcher.load()
    patcher.module_ready(defining)
    assert {d.state for d in patcher.decisions.values()} == {"applied"}
    assert defining.function(1) == (("first", 1), ("second", 1), ("engine", 1))
    patcher.undo()
    assert defining.function is original


@pytest.mark.parametrize("dropped", ["first", "second"])
def test_when_a_patch_is_dropped_the_steps_of_the_others_are_left(
    package: str, tmp_path: Path, dropped: str
) -> None:
    """Late, by a module that is imported after the replacement was made."""
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    specs = {s.__name__: spec(s.__name__, step(package, s), group=s.__name__) for s in (first, second)}
    mate = spec("mate", target(package, "Thing.static", "(x)"), group=dropped)
    patcher = planned(package, tmp_path, *specs.values(), mate)
    patcher.module_ready(defining)
    assert defining.function(1) == (("first", 1), ("second", 1), ("engine", 1))
    late = Target(f"{package}.using", "function", "", refuse)
    patcher.decisions["mate"].targets += (late,)
    patcher.module_ready(importlib.import_module(f"{package}.using"))
    kept = ({"first", "second"} - {dropped}).pop()
    states = {id: decision.state for id, decision in patcher.decisions.items()}
    assert states == {dropped: "skipped", "mate": "skipped", kept: "applied"}
    assert defining.function(1) == ((kept, 1), ("engine", 1))
    assert patcher.decisions[dropped].replaced == []
    (replacement,) = patcher.decisions[kept].replaced
    assert replacement.targets == list(specs[kept].targets)
    patcher.undo()
    assert defining.function is original


@pytest.mark.parametrize("early", [True, False], ids=["before its step", "after its step"])
def test_a_patch_that_is_refused_in_the_same_module_leaves_no_step(
    package: str, tmp_path: Path, early: bool
) -> None:
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    its_own = (refused(package), step(package, second))
    patcher = planned(
        package, tmp_path, spec("one", step(package, first)), spec("two", *(its_own if early else its_own[::-1]))
    )
    patcher.module_ready(defining)
    assert {id: d.state for id, d in patcher.decisions.items()} == {"one": "applied", "two": "skipped"}
    assert defining.function(1) == (("first", 1), ("engine", 1))
    patcher.undo()
    assert defining.function is original


def test_a_patch_that_is_turned_off_gives_no_step(package: str, tmp_path: Path) -> None:
    defining = importlib.import_module(f"{package}.defining")
    specs = (spec("one", step(package, first)), spec("two", step(package, second)))
    patcher = planned(package, tmp_path, *specs, settings=Settings(disable=frozenset({"one"})))
    patcher.module_ready(defining)
    assert defining.function(1) == (("second", 1), ("engine", 1))


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded before", "not loaded before"])
@pytest.mark.parametrize("order", ["broken first", "broken last"])
def test_a_step_that_cannot_be_imported_skips_its_own_patch(
    package: str, tmp_path: Path, order: str, loaded: bool
) -> None:
    """Its own group, that is; the other patch has its step in the replacement all the same."""
    defining = importlib.import_module(f"{package}.defining")
    original = defining.function
    specs = [
        spec("broken", step(package, f"{package}.absent:step")),
        spec("good", step(package, first)),
        spec("alone", target(package, "Thing.static", "(x)")),
    ]
    patcher = planned(package, tmp_path, *(specs if order == "broken first" else [specs[1], specs[0], specs[2]]))
    if loaded:
        patcher.load()
    patcher.module_ready(defining)
    states = {id: (d.state, d.failed) for id, d in patcher.decisions.items()}
    assert states == {"broken": ("skipped", True), "good": ("applied", False), "alone": ("applied", False)}
    assert "ModuleNotFoundError" in patcher.decisions["broken"].reason
    assert f"{package}.defining.function" in patcher.decisions["broken"].reason
    assert defining.function(1) == (("first", 1), ("engine", 1))
    patcher.undo()
    assert defining.function is original


def test_a_step_that_cannot_be_imported_is_a_failure(package: str) -> None:
    """Not a refusal of the engine: it may be so in this process alone."""
    with pytest.raises(Failure, match=rf"{package}\.defining\.function with: ModuleNotFoundError"):
        step(package, f"{package}.absent:step").load()
    with pytest.raises(Failure, match="AttributeError"):
        step(package, f"{package}.defining:absent").load_step()
    assert target(package, "function").load_step() is None


def test_only_steps_of_one_replacement_of_one_target_go_together(package: str, tmp_path: Path) -> None:
    """Another target has a replacement of its own; what is replaced otherwise is wrapped around it, or inside."""
    defining = importlib.import_module(f"{package}.defining")
    original, method = defining.function, vars(defining.Thing)["static"]

    def otherwise(original: Any, steps: Any) -> Any:
        return in_turn(original, steps)

    specs = [
        spec("first", step(package, first)),
        spec("plain", target(package, "function")),
        spec("otherwise", step(package, second, replace=otherwise)),
        spec("elsewhere", target(package, "Thing.static", "(x)", replace=in_turn, step=second)),
        spec("second", step(package, second)),
    ]
    patcher = planned(package, tmp_path, *specs)
    patcher.module_ready(defining)
    inner = (("first", 1), ("second", 1), ("engine", 1))
    assert defining.function(1) == (("second", 1), ("mmlane", inner))
    assert defining.Thing.static(1) == (("second", 1), ("engine", 1))
    assert patcher.overridden() == []
    patcher.undo()
    assert defining.function is original and vars(defining.Thing)["static"] is method


def test_who_takes_a_shared_replacement_out_is_told_for_each_of_its_patches(package: str, tmp_path: Path) -> None:
    """What follows is another thing for each of them, and so is what silences it."""
    defining = importlib.import_module(f"{package}.defining")
    patcher = planned(package, tmp_path, *(spec(s.__name__, step(package, s)) for s in (first, second)))
    patcher.module_ready(defining)
    theirs = vars(defining)["function"] = a_plugins_hook
    lines = list(map(str, patcher.overridden()))
    assert [line.partition("MMLANE_DISABLE=")[2] for line in lines] == ["first", "second"]
    assert all("function, patched by " in line and __name__ in line for line in lines)
    patcher.undo()
    assert defining.function is theirs
