"""What `mmlane doctor` looks at, as plain facts, and what of it needs attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from mmlane import __version__, engine, entry, host, settings
from mmlane.cli import lane_size, triggers
from mmlane.cli.units import size
from mmlane.problem import Problem, python, reinstall
from mmlane.report import Report

FINE, TROUBLE, USAGE, NO_ENGINE = 0, 1, 2, 3

# What carries features: the lane, segments of ours, or the engine alone.
Carrier = Literal["lane", "segments", "engine"]

# Below this much room in /dev/shm, a handful of large images does not fit. A lane has memory of its own, and
# segments carry only what comes before it is open.
SMALL_SHM: dict[Carrier, int] = {"lane": 16 << 20, "segments": 256 << 20, "engine": 256 << 20}
INLINE: dict[Carrier, str] = {
    "lane": "features that the lane cannot carry travel inline, which is slower",
    "segments": "features travel inline, which is slow",
    "engine": "without mmlane the engine may refuse image requests, or end",
}
FULL: dict[Carrier, str] = {
    "lane": "features that the lane cannot carry, and that do not fit, travel inline, which is slower",
    "segments": "features that do not fit travel inline, which is slower",
    "engine": "when it is full, without mmlane the engine may refuse image requests, or end",
}

_NVIDIA = Path("/dev/nvidiactl")  # there where a process can use a GPU of that kind


@dataclass(frozen=True)
class Machine:
    """This interpreter and this machine."""

    triggers: triggers.Triggers
    shm: host.SharedMemory | None
    memory: host.Memory
    kernel: tuple[host.Feature, ...]
    gpu: bool


@dataclass(frozen=True)
class Checks:
    """What was found. report: None without an engine. machine: None when the question was about a release."""

    settings: settings.Settings
    report: Report | None
    root: Path | None
    machine: Machine | None

    def untested(self) -> str:
        """Why this engine version counts as untested; "" when it is in the table or there is no engine."""
        words = self.report.untested if self.report is not None else ""
        return (
            words if self.machine is not None else words.partition(",")[0]
        )  # nothing is checked on a mere version

    def error(self) -> Problem | None:
        """Why nothing could be said about an engine; None when it could."""
        if self.report is not None:
            return None
        return Problem(
            "no engine: this Python cannot import sglang; run the doctor of the environment that has it, ask "
            "about a release with --engine VERSION, or install sglang here:",
            python("-m", "pip", "install", "sglang"),
        )

    def carrier(self) -> Carrier:
        """What carries features in an engine started now."""
        if self.settings.mode == "off":
            return "engine"
        if self.report is None:
            return "lane" if lane_size.has_lane(self.settings) else "segments"
        ours = self.report.ids("planned", "applied")
        if "lane" in ours:
            return "lane"
        return "segments" if "shm_pointer" in [*ours, *self.report.ids("native")] else "engine"

    def problems(self) -> list[Problem]:
        """What keeps mmlane from doing all that this engine lacks, each with the command that solves it."""
        error = self.error()
        found = [error] if error is not None else []
        if self.report is not None:
            found += self.report.trouble()
        if self.machine is not None:
            found += _trigger_problems(self.machine.triggers, self.settings)
            found += _shm_problems(self.machine, self.carrier())
            found += lane_size.problems(self.settings, self.machine.memory)
        return found

    def notes(self) -> list[str]:
        """What is worth knowing and stops nothing."""
        found = []
        if self.report is not None and self.untested() and not self.report.unsupported():
            found.append(self._untested_note(self.report))
        if self.settings.unknown:
            found.append(settings.misspelt(self.settings.unknown))
        if self.settings.former:
            found.append(settings.renamed(self.settings.former))
        if self.machine is not None:
            if self.machine.triggers.entry_point is None:
                found.append(
                    f"no entry point {triggers.NAME} in group {triggers.GROUP}; the startup hook does its work, "
                    "but only where Python runs it; reinstall mmlane with pip"
                )
            found += _shm_notes(self.machine, self.carrier()) + self._leftover_notes(self.machine.shm)
            found += lane_size.notes(self.settings, self.machine.memory, gpu=self.machine.gpu)
            missing = [feature.name for feature in self.machine.kernel if not feature.works]
            if missing:
                found.append(
                    f"this kernel lacks {', '.join(missing)}; the lane goes without where it can, "
                    "otherwise features go by shared-memory segments here"
                )
        return found

    def _untested_note(self, report: Report) -> str:
        """What it means that an engine's version is not in the table, and what to do."""
        note = f"sglang {report.engine} is {self.untested()}"
        if report.untested.startswith("unsupported"):
            return note
        if self.machine is None:
            return (
                f"{note}; it is treated like the release before it, as shown here, but nothing was checked: "
                "install it and run `mmlane doctor` there, which compares every function to be patched with the "
                "installed source, and shows as skipped what does not fit"
            )
        return (
            f"{note}: every function to be patched was compared with the installed source, and what does not fit "
            "is shown as skipped; try it with requests of your own, and look for a newer mmlane"
        )

    def _leftover_notes(self, shm: host.SharedMemory | None) -> list[str]:
        abandoned = shm.abandoned() if shm is not None else ()
        if shm is None or not abandoned:
            return []
        held = sum(segment.bytes for segment in abandoned)
        off = self.settings.mode == "off" or self.settings.sweep == "0" or "shm_sweep" in self.settings.disable
        follows = (
            "no start of an engine reclaims them with these settings: mmlane is off, or its sweep is"
            if off
            else "the next start of an engine reclaims what is provably dead"
        )
        return [
            f"{len(abandoned)} segments ({size(held)}) in {shm.path} name a maker that does not run in this pid "
            f"namespace; {follows}"
        ]

    def exit_code(self, strict: bool = False) -> int:
        """0 fine, 1 problems (`strict`: or notes), 3 no engine."""
        if self.report is None:
            return NO_ENGINE
        return TROUBLE if self.problems() or (strict and self.notes()) else FINE

    def as_dict(self, strict: bool = False) -> dict[str, Any]:
        """Plain values for JSON. A key is always there; its value is null where there is nothing to tell."""
        report, error = self.report.as_dict() if self.report is not None else None, self.error()
        return {
            "mmlane": __version__,
            "exit_code": self.exit_code(strict),
            "error": str(error) if error is not None else None,
            "problems": list(map(str, self.problems())),
            "notes": self.notes(),
            "engine": report
            and {"version": report["engine"], "untested": self.untested(), "root": _text(self.root)},
            "settings": self._settings_dict(),
            "patches": report["patches"] if report is not None else [],
            "triggers": self.machine and _triggers_dict(self.machine.triggers),
            "shm": self.machine and self.machine.shm and _shm_dict(self.machine.shm),
            "memory": self.machine and asdict(self.machine.memory),
            "kernel": self.machine and [asdict(feature) for feature in self.machine.kernel],
        }

    def _settings_dict(self) -> dict[str, Any]:
        """What the settings amount to; `defaults` names those that are at their defaults."""
        chosen, memory = self.settings, self.machine.memory if self.machine is not None else None
        return {
            "mode": chosen.mode,
            "disable": sorted(chosen.disable),
            "strict": chosen.strict,
            "log": chosen.log,
            "capacity": lane_size.capacity(chosen, memory),
            "pinned": lane_size.pinned(chosen, memory),
            "sweep": chosen.sweep,
            "defaults": [name for name in settings.OF_FIELD if chosen.is_default(name)],
            "unknown": list(chosen.unknown),
        }


def run_checks(asked: Version | None, environ: Mapping[str, str] | None = None) -> Checks:
    """Look at this interpreter and machine; or, given a version, only at what mmlane does on that release.

    Nothing is patched and the engine is not imported. Raises `settings.SettingsError`.
    """
    chosen = settings.read(os.environ if environ is None else environ)
    if asked is not None:
        return Checks(chosen, _report(chosen, engine.Engine(asked, None)), None, None)
    found = engine.installed()
    return Checks(
        settings=chosen,
        report=_report(chosen, found) if found is not None else None,
        root=found.root if found is not None else None,
        machine=Machine(
            triggers=triggers.installed(),
            shm=host.shared_memory(),
            memory=host.memory(),
            kernel=host.kernel_features(),
            gpu=_NVIDIA.exists(),
        ),
    )


def _report(chosen: settings.Settings, found: engine.Engine) -> Report:
    """What an engine process that starts now would report."""
    return entry.Session(chosen, found, "doctor").report()


def _trigger_problems(found: triggers.Triggers, chosen: settings.Settings) -> list[Problem]:
    if found.no_site and chosen.mode == "off":
        return []
    if found.no_site:
        return [
            Problem(
                "this Python was started with -S, so it runs no startup hook: an engine started like that has "
                "only the entry point, which sglang below 0.5.11 does not load; leave -S out, also for the "
                "doctor, or start the engine with",
                python("-S", "-m", "mmlane", "serve"),
            )
        ]
    if found.start_file is None:
        return [
            Problem(
                "no startup hook (mmlane.pth) in this Python's site-packages, so most engine processes run "
                "without mmlane; install it into this environment with pip, without --target, or start the "
                "engine with",
                python("-m", "mmlane", "serve"),
            )
        ]
    if not found.ran and chosen.mode != "off":
        return [
            Problem(
                f"{found.start_file} is there but did not run in this Python, so most engine processes run "
                "without mmlane; reinstall it:",
                reinstall(),
            )
        ]
    return []


def _shm_problems(machine: Machine, carrier: Carrier) -> list[Problem]:
    shm, follows = machine.shm, INLINE[carrier]
    if shm is None:
        command = f"mkdir -p {host.SHM} && mount -t tmpfs -o mode=1777 tmpfs {host.SHM}"
        return [Problem(f"no {host.SHM}: {follows}; mount a tmpfs there:", command)]
    if shm.read_only:
        what = (
            f"{shm.path} is mounted read-only: {follows}; mount it without `ro` (Docker) or `readOnly` "
            "(Kubernetes), or for now:"
        )
        return [Problem(what, f"mount -o remount,rw {shm.path}")]
    if not shm.writable:
        return [
            Problem(f"{shm.path} is not writable for this user: {follows}; as root:", f"chmod 1777 {shm.path}")
        ]
    return []


def _shm_notes(machine: Machine, carrier: Carrier) -> list[str]:
    """Whether there is room enough, where more room would help."""
    shm = machine.shm
    if shm is None or not shm.writable or shm.read_only or shm.free >= SMALL_SHM[carrier]:
        return []
    return [
        f"{shm.path} has {size(shm.free)} left of {size(shm.total)}: {FULL[carrier]}; with Docker, raise "
        "--shm-size"
    ]


def _triggers_dict(found: triggers.Triggers) -> dict[str, Any]:
    return {
        "start_file": _text(found.start_file),
        "ran": found.ran,
        "entry_point": found.entry_point,
        "no_site": found.no_site,
    }


def _shm_dict(shm: host.SharedMemory) -> dict[str, Any]:
    return {
        "path": str(shm.path),
        "total": shm.total,
        "free": shm.free,
        "writable": shm.writable,
        "read_only": shm.read_only,
        "segments": [asdict(segment) for segment in shm.segments],
    }


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None
