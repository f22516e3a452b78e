"""What mmlane did here and why, for a person and for a program.

It goes to standard error directly: the engine runs plugins before it sets up logging.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from mmlane import __version__
from mmlane.patching import Decision
from mmlane.problem import Problem
from mmlane.settings import Settings, misspelt, renamed


@dataclass(frozen=True)
class Report:
    """The state of one process. `engine` is the engine's version, `untested` why it counts as untested, or ""."""

    engine: str
    untested: str
    settings: Settings
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...] = ()

    def ids(self, *states: str) -> list[str]:
        return [d.spec.id for d in self.decisions if d.state in states]

    def unwanted(self) -> list[Decision]:
        """The patches that this engine lacks and does not get, though the user did not turn them off."""
        if self.settings.mode == "off":
            return []
        return [d for d in self.decisions if d.state == "skipped" and not d.chosen]

    def unsupported(self) -> Problem | None:
        """What it means that this engine is older than all that mmlane knows; None if not so, or mmlane is off."""
        if not self.untested.startswith("unsupported") or self.settings.mode == "off":
            return None
        return Problem(
            f"sglang {self.engine} is {self.untested}, the first release that mmlane has patches for; an engine "
            "of this release runs without them, with the faults that they fix in later ones, and does not start "
            "with MMLANE_STRICT=1; upgrade sglang, or silence this with",
            "MMLANE=off",
        )

    def block(self) -> list[str]:
        """At most six lines for the engine's log: what was applied, native and skipped."""
        untested = f" ({self.untested})" if self.untested else ""
        lines = [f"{__version__} on sglang {self.engine}{untested}, mode {self.settings.mode}"]
        lines.append(f"  applied: {_listed(self.ids('applied', 'planned'))}")
        lines.append(f"  native:  {_listed(self.ids('native'))}")
        chosen = [d.spec.id for d in self.decisions if d.chosen]
        if chosen:
            lines.append(f"  turned off: {', '.join(chosen)}")
        trouble = [f"  {line}" for line in self.attention()]
        room = 6 - len(lines)
        if len(trouble) > room:
            more = len(trouble) - (room - 1)
            trouble = [*trouble[: room - 1], f"  and {more} more lines of this kind: see `mmlane doctor`"]
        return lines + trouble

    def attention(self) -> list[str]:
        """What a person should look at: the trouble, and what stops nothing, also with MMLANE_STRICT=1."""
        lines = list(map(str, self.trouble()))
        if self.settings.unknown:
            lines.append(misspelt(self.settings.unknown))
        if self.settings.former:
            lines.append(renamed(self.settings.former))
        return lines

    def trouble(self) -> list[Problem]:
        """One problem for each group that is skipped, with why, what follows and what silences it; and `problems`.

        All that an unsupported engine is too old for is one.
        """
        unwanted, unsupported = self.unwanted(), self.unsupported()
        if unsupported:
            unwanted = [d for d in unwanted if d.spec.cell(Version(self.engine)) is not None]
        found = [unsupported] if unsupported else []
        for group in dict.fromkeys(d.spec.group for d in unwanted):
            found.append(skipped([d for d in unwanted if d.spec.group == group]))
        return found + list(self.problems)

    def line(self, role: str, pid: int, trigger: str) -> str:
        """One line that says the same for one process (MMLANE_LOG=debug)."""
        return (
            f"[{pid}] {role}: sglang {self.engine}, mode {self.settings.mode}, by {trigger}; "
            f"applied {_listed(self.ids('applied'))}; native {_listed(self.ids('native'))}; "
            f"not loaded here {_listed(self.ids('planned'))}; skipped {_listed(self.ids('skipped'))}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mmlane": __version__,
            "engine": self.engine,
            "untested": self.untested,
            "mode": self.settings.mode,
            "patches": [
                {
                    "id": d.spec.id,
                    "state": "applied" if d.state == "planned" else d.state,
                    "reason": d.explanation,
                    "chosen": d.chosen,
                    "group": d.spec.group,
                    "upstream": list(d.spec.upstream),
                    "consequence": d.spec.consequence,
                }
                for d in self.decisions
            ],
            "problems": list(map(str, self.problems)),
        }


def skipped(decisions: Iterable[Decision]) -> Problem:
    """What is skipped, why, what follows, and how to mend or silence it."""
    decisions = list(decisions)
    ids = ",".join(d.spec.id for d in decisions)
    cause = next((d for d in decisions if not d.needs), decisions[0])
    return Problem(
        f"skipped {ids}: {cause.reason}; so {cause.spec.consequence}; "
        "look for a newer mmlane, or silence this with",
        f"MMLANE_DISABLE={ids}",
    )


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) or "none"
