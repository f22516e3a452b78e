"""A plan carried out: each target as its module appears, a group whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from mmlane.patching.decision import Decision, propagate_skips
from mmlane.patching.replacement import Replacement, apply
from mmlane.patching.spec import Failure, Refusal, Target, shared_steps
from mmlane.problem import Problem


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

    def overridden(self) -> list[Problem]:
        """Read every target back: a problem for each of ours that was taken out again."""
        return [
            Problem(
                f"{replacement.target.path}, patched by {decision.spec.id}, has since been replaced by "
                f"{replacement.successor()}; so {decision.spec.consequence}; silence this with",
                f"MMLANE_DISABLE={decision.spec.id}",
            )
            for decision in self.standing("applied")
            for replacement in decision.replaced
            if not replacement.in_force()
        ]

    def _drop_group(self, culprit: Decision, refusal: Refusal) -> None:
        """Skip every patch of a group, because one of them cannot be applied; and the patches that need these.

        What others had put on top stays.
        """
        modules = {replacement.target.module for _, replacement in self._in_order}
        self.undo()
        culprit.state, culprit.reason, culprit.failed = "skipped", str(refusal), isinstance(refusal, Failure)
        propagate_skips(self.decisions)
        for module in modules:
            self.module_ready(sys.modules[module])

    def undo(self) -> None:
        """Put back every object of the engine, the last first; the plan can then be applied again."""
        while self._in_order:
            decision, replacement = self._in_order.pop()
            replacement.undo()
            decision.replaced.clear()
            decision.state = "planned"
