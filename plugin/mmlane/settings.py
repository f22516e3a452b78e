"""What the user asked for: the MMLANE_* variables, as one frozen `Settings`. Flags become variables (`flags`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

Mode = Literal["lane", "backport", "off"]
Log = Literal["debug", "info", "warning"]
Sweep = Literal["0", "1", "private"]

MODES: tuple[str, ...] = get_args(Mode)
LOGS: tuple[str, ...] = get_args(Log)
SWEEPS: tuple[str, ...] = get_args(Sweep)

PINNED = 1 << 30  # bytes of all tokenizers' lanes that ranks on CUDA register, unless the user says otherwise

# By field of `Settings`: the variable that says it.
OF_FIELD = {
    "mode": "MMLANE",
    "disable": "MMLANE_DISABLE",
    "strict": "MMLANE_STRICT",
    "log": "MMLANE_LOG",
    "capacity": "MMLANE_CAPACITY_MB",
    "pinned": "MMLANE_PINNED_MB",
    "sweep": "MMLANE_SWEEP",
}
VARIABLES = tuple(OF_FIELD.values())
FORMER = {"arena": "lane"}  # former names of a mode and of a patch, which are accepted until 0.2.0
# What mmlane tells its own children, and where it keeps what it made: variables, but no settings.
_OTHERS = ("MMLANE_IPC_LOCK", "MMLANE_CACHE")


class SettingsError(ValueError):
    """A setting has a value that means nothing; the message lists the right ones."""


@dataclass(frozen=True)
class Settings:
    """`disable` holds patch ids; `log` is what mmlane prints on standard error.

    capacity: the most that the lane of one tokenizer process may hold, in bytes; None: a quarter of the memory of
    the machine or control group, divided by the number of tokenizer workers.
    pinned: of that, what ranks on CUDA register as pinned memory, in bytes; None: 1 GiB, divided by the number of
    tokenizer workers; 0: nothing, and ranks get tensors of their own, which can be written to.
    sweep: whether to reclaim what a crashed engine left in /dev/shm; "private": also where that takes the user's
    word that no other container uses that /dev/shm.
    log "info": one block at engine start, and whatever needs attention; "warning": only the latter;
    "debug": also one line from every process of the engine.
    unknown: MMLANE_* variables that are set and do not exist. former: settings given by a former name.
    typed: for variables that a flag has set in this process, what the user typed in front of the value.
    """

    mode: Mode = "lane"
    disable: frozenset[str] = frozenset()
    strict: bool = False
    log: Log = "info"
    capacity: int | None = None
    pinned: int | None = None
    sweep: Sweep = "1"
    unknown: tuple[str, ...] = ()
    former: tuple[str, ...] = ()
    typed: Mapping[str, str] = field(default_factory=dict, compare=False)

    def as_typed(self, variable: str, value: str) -> str:
        """A value of a setting as the user gave it: by a flag, in a config file, or by the variable."""
        return _as_typed(variable, value, self.typed)

    def pinned_of_one(self, workers: int) -> int:
        """What ranks on CUDA register of one tokenizer's lane, in bytes, with that many tokenizer workers."""
        return PINNED // max(workers, 1) if self.pinned is None else self.pinned

    def is_default(self, field: str) -> bool:
        """Whether a setting has its default."""
        return bool(getattr(self, field) == getattr(_DEFAULTS, field))


_DEFAULTS = Settings()


def read(environ: Mapping[str, str], typed: Mapping[str, str] | None = None) -> Settings:
    """Settings from the MMLANE_* variables. Raises `SettingsError`.

    typed: which of the variables a flag has set, as `flags.take_flags` returns it; errors name the flag then.
    """
    variables, typed = OF_FIELD, typed or {}
    mode = _one_of(variables["mode"], environ, (*MODES, *FORMER), "lane", typed)
    log = _one_of(variables["log"], environ, LOGS, "info", typed)
    strict = _one_of(variables["strict"], environ, ("0", "1"), "0", typed)
    sweep = _one_of(variables["sweep"], environ, SWEEPS, "1", typed)
    disable = listed(environ.get(variables["disable"], ""))
    former = [_as_typed(variables["mode"], mode, typed)] if mode in FORMER else []
    former += [_as_typed(variables["disable"], patch, typed) for patch in disable if patch in FORMER]
    return Settings(
        mode=cast(Mode, FORMER.get(mode, mode)),
        disable=frozenset(FORMER.get(patch, patch) for patch in disable),
        strict=strict == "1",
        log=cast(Log, log),
        capacity=_mebibytes(variables["capacity"], environ, least=1),
        pinned=_mebibytes(variables["pinned"], environ, least=0),
        sweep=cast(Sweep, sweep),
        unknown=tuple(
            sorted(name for name in environ if name.startswith("MMLANE_") and name not in (*VARIABLES, *_OTHERS))
        ),
        former=tuple(former),
        typed=typed,
    )


def renamed(former: Iterable[str]) -> str:
    """The line about settings that were given by former names."""
    names = ", ".join(f"{old} is called {new}" for old, new in FORMER.items())
    return f"{', '.join(former)}: {names} now, and the former name is accepted until 0.2.0 only"


def misspelt(unknown: Iterable[str]) -> str:
    """The line about unknown variables: each with the nearest one that exists."""
    named = []
    for name in unknown:
        meant = nearest(name.removeprefix("MMLANE_"))
        named.append(f"{name} (did you mean {meant}?)" if meant else name)
    return f"unknown variables, which do nothing: {', '.join(named)}"


def nearest(name: str) -> str | None:
    """The variable whose name, without MMLANE_, is most like this one; None where none is."""
    known = {(variable.removeprefix("MMLANE_") if "_" in variable else "MODE"): variable for variable in VARIABLES}
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return known[alike[0]] if alike else None


def _as_typed(variable: str, value: str, typed: Mapping[str, str]) -> str:
    return f"{typed.get(variable, f'{variable}=')}{value}"


def listed(value: str) -> list[str]:
    """The words of a list with commas, in order, each once."""
    return list(dict.fromkeys(word.strip() for word in value.split(",") if word.strip()))


def _one_of(
    variable: str, environ: Mapping[str, str], right: tuple[str, ...], default: str, typed: Mapping[str, str]
) -> str:
    value = environ.get(variable, "").strip().lower() or default
    if value not in right:
        wrong = _as_typed(variable, environ[variable], typed)
        raise SettingsError(f"{wrong} is not one of: {', '.join(word for word in right if word not in FORMER)}")
    return value


def _mebibytes(variable: str, environ: Mapping[str, str], *, least: int) -> int | None:
    value = environ.get(variable, "").strip()
    if not value:
        return None
    try:
        count = int(value) if value.isdecimal() else -1
    except ValueError:  # more digits than Python converts
        count = -1
    if count < least:
        raise SettingsError(f"{variable}={environ[variable]} is not a number of MiB, such as 4096")
    return count << 20
