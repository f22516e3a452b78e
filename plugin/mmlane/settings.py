"""What the user asked for: MMLANE_* variables and --mmlane* flags, as one frozen `Settings`.

Flags are taken off the engine's command line before the engine parses it and are carried to child
processes as the variables of the same meaning. A flag wins over its variable. Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

Mode = Literal["arena", "backport", "off"]
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
# What mmlane tells its own children, and where it keeps what it made: variables, but no settings.
_OTHERS = ("MMLANE_IPC_LOCK", "MMLANE_CACHE")


class SettingsError(ValueError):
    """A setting has a value that means nothing; the message lists the right ones."""


@dataclass(frozen=True)
class Flag:
    """A command line flag and the variable that carries it. `takes_value` False: its presence means "1"."""

    name: str
    variable: str
    metavar: str
    help: str
    takes_value: bool = True


FLAGS = (
    Flag("--mmlane", "MMLANE", "{" + ",".join(MODES) + "}", "What mmlane does (default: arena)."),
    Flag("--mmlane-disable", "MMLANE_DISABLE", "ID[,ID...]", "Patches that are not to be applied."),
    Flag(
        "--mmlane-strict",
        "MMLANE_STRICT",
        "",
        "Refuse to start when a patch that this engine version needs cannot be applied.",
        takes_value=False,
    ),
)


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
    unknown: MMLANE_* variables that are set and that nobody reads.
    """

    mode: Mode = "arena"
    disable: frozenset[str] = frozenset()
    strict: bool = False
    log: Log = "info"
    capacity: int | None = None
    pinned: int | None = None
    sweep: Sweep = "1"
    unknown: tuple[str, ...] = ()

    def pinned_of_one(self, workers: int) -> int:
        """What ranks on CUDA register of one tokenizer's lane, in bytes, with that many tokenizer workers."""
        return PINNED // max(workers, 1) if self.pinned is None else self.pinned

    def is_default(self, field: str) -> bool:
        """Whether a setting is what it is when nobody says anything."""
        return bool(getattr(self, field) == getattr(_DEFAULTS, field))


_DEFAULTS = Settings()


def read(environ: Mapping[str, str]) -> Settings:
    """Settings from the MMLANE_* variables. Raises `SettingsError`."""
    variables = OF_FIELD
    mode = _one_of(variables["mode"], environ, MODES, "arena")
    log = _one_of(variables["log"], environ, LOGS, "info")
    strict = _one_of(variables["strict"], environ, ("0", "1"), "0")
    sweep = _one_of(variables["sweep"], environ, SWEEPS, "1")
    disable = (word.strip() for word in environ.get(variables["disable"], "").split(","))
    return Settings(
        mode=cast(Mode, mode),
        disable=frozenset(word for word in disable if word),
        strict=strict == "1",
        log=cast(Log, log),
        capacity=_mebibytes(variables["capacity"], environ, least=1),
        pinned=_mebibytes(variables["pinned"], environ, least=0),
        sweep=cast(Sweep, sweep),
        unknown=tuple(
            sorted(name for name in environ if name.startswith("MMLANE_") and name not in (*VARIABLES, *_OTHERS))
        ),
    )


def misspelt(unknown: Iterable[str]) -> str:
    """What to say of variables that nobody reads: each with the nearest one that is read."""
    known = {(name.removeprefix("MMLANE_") if "_" in name else "MODE"): name for name in VARIABLES}
    named = []
    for name in unknown:
        nearest = difflib.get_close_matches(name.removeprefix("MMLANE_"), known, n=1, cutoff=0.5)
        named.append(f"{name} (did you mean {known[nearest[0]]}?)" if nearest else name)
    return f"unknown variables, which do nothing: {', '.join(named)}"


def _one_of(variable: str, environ: Mapping[str, str], right: tuple[str, ...], default: str) -> str:
    value = environ.get(variable, "").strip().lower() or default
    if value not in right:
        raise SettingsError(f"{variable}={environ[variable]} is not one of: {', '.join(right)}")
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


def take_flags(argv: list[str], environ: MutableMapping[str, str]) -> list[str]:
    """Move mmlane's flags from `argv` (edited in place) to `environ`; return the words that were taken.

    Both `--flag value` and `--flag=value` are understood. Raises `SettingsError` for an unknown --mmlane
    flag, a missing value, or a wrong one.
    """
    flags = {flag.name: flag for flag in FLAGS}
    kept: list[str] = []
    taken: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--mmlane"):
            kept.append(word)
            continue
        flag = flags.get(name)
        if flag is None:
            raise SettingsError(f"{name} is not one of: {', '.join(flags)}")
        taken.append(word)
        if not flag.takes_value:
            if equals:
                raise SettingsError(f"{name} takes no value, got {value!r}")
            value = "1"
        elif not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise SettingsError(f"{name} needs a value: {flag.metavar}")
            taken.append(following)
            value = following
        environ[flag.variable] = value
    read(environ)  # a wrong value is refused here, where the user typed it
    argv[:] = kept
    return taken
