"""A patch as data: which engine objects it replaces, on which engine versions, and what there is to say of it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

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
        return f"wanted {self.path}{' or '.join(_as_written(signature) for signature in self.signatures)}"

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


def _as_written(signature: str) -> str:
    """A signature as it stands behind a name."""
    return signature if signature.startswith("(") else f" = {signature}"
