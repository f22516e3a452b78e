"""What `mmlane doctor` looks at, as plain facts, and what of it needs attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from mmlane import __version__, engine, entry, host, settings
from mmlane.cli import lane_size, triggers
from mmlane.cli.units import size
from mmlane.report import Report

FINE, TROUBLE, USAGE, NO_ENGINE = 0, 1, 2, 3

# Below this much room a handful of large images goes inline instead of by shared memory.
SMALL_SHM = 256 << 20

_NVIDIA = Path("/dev/nvidiactl")  # there where a process can use a GPU of that kind


@dataclass(frozen=True)
class Here:
    """This interpreter and this machine."""

    triggers: triggers.Triggers
    shm: host.SharedMemory | None
    memory: host.Memory
    kernel: tuple[host.Feature, ...]
    gpu: bool


@dataclass(frozen=True)
class Examination:
    """What was found. `report` is None without an engine; `here` is None when the question was about a release."""

    settings: settings.Settings
    report: Report | None
    root: Path | None
    here: Here | None

    def untested(self) -> str:
        """Why this engine version counts as untested; "" when it is in the table or there is no engine."""
        words = self.report.untested if self.report is not None else ""
        return words if self.here is not None else words.partition(",")[0]  # nothing is checked on a mere version

    def problems(self) -> list[str]:
        """What keeps mmlane from doing all that this engine lacks, each with its remedy."""
        found = []
        if self.report is None:
            found.append(
                "no engine: this Python cannot import sglang; install it here, run the doctor of the environment "
                "that has it, or ask about a release with --engine VERSION"
            )
        else:
            found += self.report.trouble()
        if self.here is not None:
            found += _trigger_problems(self.here.triggers, self.settings) + _shm_problems(self.here.shm)
            found += lane_size.problems(self.settings, self.here.memory)
        return found

    def notes(self) -> list[str]:
        """What is worth knowing and stops nothing."""
        found = []
        if self.report is not None and self.untested():
            found.append(f"sglang {self.report.engine} is {self.untested()}")
        if self.settings.unknown:
            found.append(settings.misspelt(self.settings.unknown))
        if self.here is not None:
            if self.here.triggers.entry_point is None:
                found.append(
                    f"no entry point {triggers.NAME} in the group {triggers.GROUP}; the start line does its work, "
                    "but only where Python runs it; reinstall mmlane with pip"
                )
            found += _shm_notes(self.here.shm)
            found += lane_size.notes(self.settings, self.here.memory, gpu=self.here.gpu)
            missing = [feature.name for feature in self.here.kernel if not feature.works]
            if missing:
                found.append(
                    f"this kernel lacks {', '.join(missing)}; the lane goes without where it can, "
                    "otherwise features go by shared-memory segments here"
                )
        return found

    def exit_code(self, strict: bool = False) -> int:
        """0 fine, 1 problems (`strict`: or notes), 3 no engine."""
        if self.report is None:
            return NO_ENGINE
        return TROUBLE if self.problems() or (strict and self.notes()) else FINE

    def as_dict(self, strict: bool = False) -> dict[str, Any]:
        """Plain values for JSON. A key is always there; its value is null where there is nothing to tell."""
        report = self.report.as_dict() if self.report is not None else None
        return {
            "mmlane": __version__,
            "exit_code": self.exit_code(strict),
            "problems": self.problems(),
            "notes": self.notes(),
            "engine": report
            and {"version": report["engine"], "untested": self.untested(), "root": _text(self.root)},
            "settings": self._settings_dict(),
            "patches": report["patches"] if report is not None else [],
            "triggers": self.here and _triggers_dict(self.here.triggers),
            "shm": self.here and self.here.shm and _shm_dict(self.here.shm),
            "memory": self.here and asdict(self.here.memory),
            "kernel": self.here and [asdict(feature) for feature in self.here.kernel],
        }

    def _settings_dict(self) -> dict[str, Any]:
        """What the settings amount to; `defaults` names those that nobody has chosen otherwise."""
        chosen, memory = self.settings, self.here.memory if self.here is not None else None
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


def examine(asked: Version | None, environ: Mapping[str, str] | None = None) -> Examination:
    """Look at this interpreter and machine; or, given a version, only at what mmlane does on that release.

    Nothing is patched and the engine is not imported. Raises `settings.SettingsError`.
    """
    chosen = settings.read(os.environ if environ is None else environ)
    if asked is not None:
        return Examination(chosen, _report(chosen, engine.Engine(asked, None)), None, None)
    installed = triggers.installed()
    found = engine.installed()
    return Examination(
        settings=chosen,
        report=_report(chosen, found) if found is not None else None,
        root=found.root if found is not None else None,
        here=Here(installed, host.shared_memory(), host.memory(), host.kernel_features(), _NVIDIA.exists()),
    )


def _report(chosen: settings.Settings, found: engine.Engine) -> Report:
    """What an engine process that starts now would report."""
    return entry.Session(chosen, found, "doctor").report()


def _trigger_problems(found: triggers.Triggers, chosen: settings.Settings) -> list[str]:
    if found.start_file is None:
        return [
            "no start line (mmlane.pth) in this Python's site-packages, so most engine processes run without "
            "mmlane; install it into this environment with pip, without --target"
        ]
    if not found.ran and chosen.mode != "off":
        return [f"{found.start_file} is there but did not run; was Python started with -S or -I?"]
    return []


def _shm_problems(shm: host.SharedMemory | None) -> list[str]:
    if shm is None:
        return [f"no {host.SHM}: features travel inline, which is slow; mount a tmpfs there"]
    if not shm.writable:
        return [f"{shm.path} is not writable for this user: features travel inline, which is slow; chmod 1777 it"]
    return []


def _shm_notes(shm: host.SharedMemory | None) -> list[str]:
    if shm is None:
        return []
    found = []
    if shm.free < SMALL_SHM:
        found.append(
            f"{shm.path} has {size(shm.free)} left of {size(shm.total)}: features that do not fit travel inline, "
            "which is slower; with Docker, raise --shm-size"
        )
    abandoned = shm.abandoned()
    if abandoned:
        held = sum(segment.bytes for segment in abandoned)
        found.append(
            f"{len(abandoned)} segments ({size(held)}) in {shm.path} name a maker that does not run in this pid "
            "namespace; the next start of an engine reclaims what is provably dead"
        )
    return found


def _triggers_dict(found: triggers.Triggers) -> dict[str, Any]:
    return {"start_file": _text(found.start_file), "ran": found.ran, "entry_point": found.entry_point}


def _shm_dict(shm: host.SharedMemory) -> dict[str, Any]:
    return {
        "path": str(shm.path),
        "total": shm.total,
        "free": shm.free,
        "writable": shm.writable,
        "segments": [asdict(segment) for segment in shm.segments],
    }


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None
