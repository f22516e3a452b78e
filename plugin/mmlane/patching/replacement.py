"""One target replaced in this process: applied, looked at again, and undone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mmlane.patching.origin import plain, replaced_by, wrapped
from mmlane.patching.spec import Failure, Refusal, Target


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
        """Whether the engine would run ours: it is in place, or other code has wrapped it."""
        ours = plain(self.installed)
        current = plain(vars(self.owner).get(self.attribute))
        while current is not None and current is not ours:
            current = wrapped(current)
        return current is ours

    def successor(self) -> str:
        """Which code has put there what is there now, instead of ours."""
        module = sys.modules[self.target.module]
        return replaced_by(vars(self.owner).get(self.attribute), module) or "the engine's own object"

    def undo(self) -> None:
        """Put the very object back that was there, unless other code has replaced ours since."""
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
    except Exception as error:  # a patch's code, maybe another package's; the engine's import must not fail of it
        raise Failure(f"nothing to replace {target.path} with: {type(error).__name__}: {error}") from error
    _rebind(owner, attribute, original, installed)
    return Replacement(target, owner, attribute, original, installed)


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
