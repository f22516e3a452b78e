"""Patches as data: what they change, where, for which engine versions; and how one is applied and undone.

A patch is a `PatchSpec` with one or more `Target`s. It goes through resolve -> check -> apply -> verify, and
back through undo. The check reads the engine's source without importing it, so that every process of
one engine comes to the same decision, and so that the same code serves wheels that are not installed.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import CellType, ModuleType
from typing import Any, Literal, Protocol

from packaging.version import Version

State = Literal["apply", "native"]


@dataclass(frozen=True)
class Cell:
    """What a patch does on the engine versions from `since` up to the next cell.

    `reason`: for "apply" what it fixes there, completing "fixes: ..."; for "native" how the engine does it.
    `faults` are the ids of what it fixes, where `tools/probes.py` knows them.
    """

    since: Version
    state: State
    reason: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One engine object that a patch replaces: a function, a method, a class, or a constant of a module.

    `name` is dotted inside `module` ("Scheduler.recv_requests"). `signature` lists the parameter lists that
    the replacement can live with, as in "(self, recv_reqs)": names and kinds, no annotations, no default
    values (`x=` marks a default). For a class it is that of its `__init__`, for a constant its value as written,
    which tells whether it is still the engine's own.
    `replace` is given the engine's object and returns what takes its place; as a string, "module:function", it is
    imported as soon as torch is there (`Patcher.load`), so that a patch file need not import what the engine is
    yet to. That module may import torch; the engine only inside of its functions.
    `step`: for a function that several patches want. It is wrapped once, by the `replace` that they all name,
    which is also given a tuple of their steps, in the order of the patches. It may be a string, too.
    `since` and `before` bound the engine versions on which this target is the right place.
    """

    module: str
    name: str
    signature: str | tuple[str, ...]
    replace: Callable[..., Any] | str
    step: Callable[..., Any] | str | None = None
    since: str = "0"
    before: str | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def signatures(self) -> tuple[str, ...]:
        return (self.signature,) if isinstance(self.signature, str) else self.signature

    @property
    def wanted(self) -> str:
        """What is looked for, in words."""
        return f"wanted {self.path}{' or '.join(_told(signature) for signature in self.signatures)}"

    def load(self) -> None:
        """Import what is named by a string. Raises `Failure`."""
        self._loaded(self.replace)
        self.load_step()

    def load_step(self) -> Callable[..., Any] | None:
        """`step`, imported. Raises `Failure`."""
        return None if self.step is None else self._loaded(self.step)

    def build(self, original: Any, steps: tuple[Callable[..., Any], ...] = ()) -> Any:
        """What takes the place of the engine's `original`."""
        replace = self._loaded(self.replace)
        return replace(original) if self.step is None else replace(original, steps)

    def _loaded(self, named: Callable[..., Any] | str) -> Callable[..., Any]:
        if not isinstance(named, str):
            return named
        try:
            found: Callable[..., Any] = pkgutil.resolve_name(named)
        except Exception as error:  # as in `apply`
            raise Failure(f"nothing to replace {self.path} with: {type(error).__name__}: {error}") from error
        return found

    def shares(self, other: Target) -> bool:
        """Whether the two are steps of one replacement."""
        together = self.step is not None and other.step is not None
        return together and (self.path, self.replace) == (other.path, other.replace)

    def serves(self, version: Version) -> bool:
        """Whether this is a target on that engine version. A pre-release counts as before its release."""
        return Version(self.since) <= version and (self.before is None or version < Version(self.before))


@dataclass(frozen=True)
class PatchSpec:
    """One fix. `cells` say on which engine versions it is applied and on which the engine has it.

    Patches of one `group` need each other: the group is applied whole or not at all. A patch that `needs` others
    is skipped where one of them is, not the other way round. `modes`: where it is wanted.
    `consequence` says, in a user's words, what follows where it is missing. `relies_on`: dotted paths of what it
    leans on in the engine besides its targets, on any release; `make matrix-new` tells which of it has changed.
    """

    id: str
    why: str
    consequence: str
    upstream: tuple[str, ...]
    drop_when: str
    group: str
    cells: tuple[Cell, ...]
    targets: tuple[Target, ...]
    modes: frozenset[str] = frozenset({"lane", "backport"})
    needs: frozenset[str] = frozenset()
    relies_on: tuple[str, ...] = ()

    def cell(self, version: Version) -> Cell | None:
        """The cell that holds for an engine version, or None below the oldest."""
        found = None
        for cell in sorted(self.cells, key=lambda cell: cell.since):
            if cell.since <= version:
                found = cell
        return found

    def targets_on(self, version: Version) -> tuple[Target, ...]:
        return tuple(target for target in self.targets if target.serves(version))


class Refusal(Exception):
    """A target cannot be patched as the patch expects; the message says what was wanted and what was found."""


class Failure(Refusal):
    """A patch's own code failed, or is not there: unlike what the engine looks like, that may be so here alone."""


def shared_steps(target: Target, targets: Iterable[Target]) -> tuple[Callable[..., Any], ...]:
    """The steps of those targets that share a replacement, each once; less those that cannot be imported.

    The patch of such a step is dropped when its own turn comes, and the others are applied again.
    """
    steps: dict[Callable[..., Any], None] = {}
    for other in targets:
        if target.shares(other):
            with suppress(Failure):
                steps[other.load_step()] = None  # type: ignore[index]
    return tuple(steps)


class Source(Protocol):
    """The source of an engine, as far as it is asked for here."""

    def signature(self, module: str, name: str) -> str:
        """As in `Target.signature`. Raises `LookupError`."""


def check(target: Target, source: Source) -> None:
    """Raise `Refusal` unless the source has the target, with a signature that the patch can live with."""
    try:
        found = source.signature(target.module, target.name)
    except LookupError as missing:
        raise Refusal(f"{target.wanted}, found {missing}") from None
    if found not in target.signatures:
        raise Refusal(f"{target.wanted}, found {found}")


def _told(signature: str) -> str:
    """A signature as it stands behind a name."""
    return signature if signature.startswith("(") else f" = {signature}"


# --- apply, verify, undo: the engine's objects -------------------------------------------------------------


@dataclass
class Replacement:
    """One target as it stands in this process: where it was put, what was there, what is there now.

    targets: those of the patches that share it.
    """

    target: Target
    owner: Any
    attribute: str
    original: Any
    installed: Any
    targets: list[Target] = field(default_factory=list)

    def in_force(self) -> bool:
        """Whether the engine would run ours: it is in place, or someone has wrapped it further."""
        ours = _function(self.installed)
        current = _function(vars(self.owner).get(self.attribute))
        while current is not None and current is not ours:
            current = _wrapped(current)
        return current is ours

    def successor(self) -> str:
        """Who put what is there now in our place."""
        module = sys.modules[self.target.module]
        return replaced_by(vars(self.owner).get(self.attribute), module) or "the engine's own object"

    def undo(self) -> None:
        """Put the very object back that was there, unless somebody else has replaced ours meanwhile."""
        if vars(self.owner).get(self.attribute) is self.installed:
            _rebind(self.owner, self.attribute, self.installed, self.original)


def apply(
    target: Target,
    module: ModuleType,
    ours: Collection[Replacement] = (),
    steps: tuple[Callable[..., Any], ...] = (),
) -> Replacement:
    """Replace a target in an imported module, and wherever the engine holds it by `from module import name`.

    `ours` are replacements that may be wrapped again, `steps` those of `Target.step`. Raises `Refusal` when the
    object is missing, or is neither the engine's own nor one of those, and when nothing can be made to take its
    place.
    """
    *outer, attribute = target.name.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner).get(part)
        if owner is None:
            raise Refusal(f"wanted {target.path}, found no {part} in {module.__name__}")
    if attribute not in vars(owner):
        raise Refusal(f"wanted {target.path}, found no {attribute} there")
    original = vars(owner)[attribute]
    stacked = any(replacement.installed is original for replacement in ours)
    engines_own = stacked or repr(original) in target.signatures  # the latter: a constant
    foreign = None if engines_own else replaced_by(original, module)
    if foreign is not None:
        raise Refusal(f"{target.path} is already replaced by {foreign}")
    try:
        if isinstance(original, staticmethod | classmethod):
            installed: Any = type(original)(target.build(original.__func__, steps))
        else:
            installed = target.build(original, steps)
    except Refusal:
        raise
    except Exception as error:  # a patch's code, perhaps somebody else's; the engine's import must not fail of it
        raise Failure(f"nothing to replace {target.path} with: {type(error).__name__}: {error}") from error
    _rebind(owner, attribute, original, installed)
    return Replacement(target, owner, attribute, original, installed)


def _function(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _wrapped(function: Any) -> Any:
    """What a function calls in turn, or None.

    The engine's hooks, and others', set `__wrapped__` on a plain replacement too, which never calls what it names.
    """
    inner = getattr(function, "__wrapped__", None)
    held = _held(function)
    return inner if held is None or any(value is inner for value in held) else None


def _held(function: Any) -> list[Any] | None:
    """What a function holds from the scope that it was defined in; None for what is no such function."""
    cells = getattr(function, "__closure__", None)
    return None if cells is None else [cell.cell_contents for cell in cells if cell != CellType()]


def replaced_by(value: Any, module: ModuleType) -> str | None:
    """Who put `value` in an engine module in place of the engine's own object, or None when nobody did."""
    function = _function(value)
    engine = module.__name__.partition(".")[0]
    if isinstance(function, type):
        home = function.__module__
        return None if home.partition(".")[0] == engine else f"{home}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return f"a {type(function).__name__} object" if callable(function) else repr(function)
    # A decorator copies __module__ and __qualname__, so only the code tells where a function comes from.
    for name, candidate in list(sys.modules.items()):
        if isinstance(candidate, ModuleType) and vars(candidate).get("__file__") == code.co_filename:
            if name.startswith(f"{engine}.srt.plugins") and name != module.__name__:
                # The engine's own way to hook; whose hook it is tells what its wrapper holds.
                functions = [held for held in _held(function) or () if hasattr(held, "__qualname__")]
                homes = [(held.__module__ or name, held.__qualname__) for held in functions]
                theirs = [f"{home}.{qualname}" for home, qualname in homes if home.partition(".")[0] != engine]
                return ", ".join(theirs) or name
            if name.partition(".")[0] == engine:
                return None
            return f"{name}:{code.co_qualname if sys.version_info >= (3, 11) else code.co_name}"
    return None if code.co_filename == getattr(module, "__file__", None) else code.co_filename


def _rebind(owner: Any, attribute: str, old: Any, new: Any) -> None:
    setattr(owner, attribute, new)
    if not isinstance(owner, ModuleType):
        return  # a method is found through its class alone
    engine = owner.__name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == engine and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                # One small number or word may be the value of many constants.
                if value is old and (key == attribute or callable(old)):
                    setattr(module, key, new)


@dataclass
class Decision:
    """What became of one patch here, and why.

    `chosen`: it is skipped because the user said so. `needs`: it is skipped because that patch of its group is.
    `failed`: it is skipped because its own code failed.
    """

    spec: PatchSpec
    state: Literal["planned", "applied", "native", "skipped"]
    reason: str
    targets: tuple[Target, ...] = ()
    chosen: bool = False
    needs: str = ""
    failed: bool = False
    replaced: list[Replacement] = field(default_factory=list)

    @property
    def explanation(self) -> str:
        """The reason, and whose it is where it is another patch's."""
        return f"needs {self.needs}: {self.reason}" if self.needs else self.reason


def spread(decisions: Mapping[str, Decision]) -> None:
    """Skip what cannot be applied because something else is skipped: the rest of a group, and what needs it."""
    changed = True
    while changed:
        changed = False
        for culprit in [decision for decision in decisions.values() if decision.state == "skipped"]:
            for decision in decisions.values():
                together = decision.spec.group == culprit.spec.group
                if decision.state == "planned" and (together or culprit.spec.id in decision.spec.needs):
                    decision.state, decision.reason, decision.chosen = "skipped", culprit.reason, culprit.chosen
                    decision.needs = culprit.needs or culprit.spec.id
                    changed = True


class Patcher:
    """Applies a plan target by target as the engine's modules appear, a group whole or not at all."""

    def __init__(self, decisions: Mapping[str, Decision]) -> None:
        self.decisions = dict(decisions)
        self._in_order: list[tuple[Decision, Replacement]] = []

    def standing(self, state: str) -> list[Decision]:
        """The decisions that are in a state now."""
        return [decision for decision in self.decisions.values() if decision.state == state]

    def modules(self) -> set[str]:
        """The engine modules that this plan has to see."""
        return {
            target.module
            for decision in self.decisions.values()
            if decision.state in ("planned", "applied")
            for target in decision.targets
        }

    def load(self) -> None:
        """Import all that the plan names; a group for which that fails is skipped. Idempotent.

        The engine imports some of its modules late, when our files may be gone, or those of another version.
        """
        for decision in self.decisions.values():
            if decision.state not in ("planned", "applied"):
                continue
            try:
                for target in decision.targets:
                    target.load()
            except Failure as failure:
                self._drop_group(decision, failure)

    def module_ready(self, module: ModuleType) -> None:
        """Apply what the plan holds for a module that has just been, or already was, imported. Idempotent."""
        for decision in self.decisions.values():
            if decision.state not in ("planned", "applied"):
                continue
            for target in decision.targets:
                if target.module != module.__name__ or any(target in r.targets for r in decision.replaced):
                    continue
                try:
                    target.load_step()
                    replacement = self._shared(target) or apply(
                        target, module, [ours for _, ours in self._in_order], self._steps(target)
                    )
                except Refusal as refusal:
                    self._drop_group(decision, refusal)
                    break
                replacement.targets.append(target)
                decision.replaced.append(replacement)
                decision.state = "applied"
                self._in_order.append((decision, replacement))

    def _shared(self, target: Target) -> Replacement | None:
        """The replacement that another patch's target shares with this one, if it is in place."""
        return next((r for _, r in self._in_order if target.shares(r.target)), None)

    def _steps(self, target: Target) -> tuple[Callable[..., Any], ...]:
        """Of all patches that share a target's replacement."""
        standing = [decision for decision in self.decisions.values() if decision.state in ("planned", "applied")]
        return shared_steps(target, (other for decision in standing for other in decision.targets))

    def overridden(self) -> list[str]:
        """Read every target back: one line for each of ours that somebody has taken out again."""
        return [
            f"{replacement.target.path}, patched by {decision.spec.id}, has since been replaced by "
            f"{replacement.successor()}; so {decision.spec.consequence}; silence this with "
            f"MMLANE_DISABLE={decision.spec.id}"
            for decision in self.standing("applied")
            for replacement in decision.replaced
            if not replacement.in_force()
        ]

    def _drop_group(self, culprit: Decision, refusal: Refusal) -> None:
        """Skip every patch of a group, because one of them cannot be applied; what others had put on top stays.

        So are patches that need one of these.
        """
        modules = {replacement.target.module for _, replacement in self._in_order}
        self.undo()
        culprit.state, culprit.reason, culprit.failed = "skipped", str(refusal), isinstance(refusal, Failure)
        spread(self.decisions)
        for module in modules:
            self.module_ready(sys.modules[module])

    def undo(self) -> None:
        """Put back every object of the engine, the last first; the plan can then be applied again."""
        while self._in_order:
            decision, replacement = self._in_order.pop()
            replacement.undo()
            decision.replaced.clear()
            decision.state = "planned"
