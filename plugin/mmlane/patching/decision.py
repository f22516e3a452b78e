"""What becomes of each patch, and what follows from that for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmlane.patching.replacement import Replacement
from mmlane.patching.spec import PatchSpec, Target


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


def propagate_skips(decisions: Mapping[str, Decision]) -> None:
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
