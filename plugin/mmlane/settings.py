"""What the user asked for: MMLANE_* variables and --mmlane* flags, as one frozen `Settings`.

Flags are taken off the engine's command line before the engine parses it and are carried to child
processes as the variables of the same meaning. A flag wins over its variable, and one on the command line over one
in the engine's config file. Standard library only, but for a config file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

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
class Flag:
    """A command line flag and the variable that carries it. `takes_value` False: its presence means "1".

    is_list: its value is a list with commas, and repeated flags add up.
    """

    name: str
    variable: str
    metavar: str
    help: str
    takes_value: bool = True
    is_list: bool = False


FLAGS = (
    Flag("--mmlane", "MMLANE", "{" + ",".join(MODES) + "}", "What mmlane does (default: lane)."),
    Flag("--mmlane-disable", "MMLANE_DISABLE", "ID[,ID...]", "Patches that are not to be applied.", is_list=True),
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

    typed: which of the variables a flag has set, as `take_flags` returns it; errors name the flag then.
    """
    variables, typed = OF_FIELD, typed or {}
    mode = _one_of(variables["mode"], environ, (*MODES, *FORMER), "lane", typed)
    log = _one_of(variables["log"], environ, LOGS, "info", typed)
    strict = _one_of(variables["strict"], environ, ("0", "1"), "0", typed)
    sweep = _one_of(variables["sweep"], environ, SWEEPS, "1", typed)
    disable = _listed(environ.get(variables["disable"], ""))
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
        nearest = _nearest(name.removeprefix("MMLANE_"))
        named.append(f"{name} (did you mean {nearest}?)" if nearest else name)
    return f"unknown variables, which do nothing: {', '.join(named)}"


def _nearest(name: str) -> str | None:
    """The variable whose name, without MMLANE_, is most like this one; None where none is."""
    known = {(variable.removeprefix("MMLANE_") if "_" in variable else "MODE"): variable for variable in VARIABLES}
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return known[nearest[0]] if nearest else None


def _as_typed(variable: str, value: str, typed: Mapping[str, str]) -> str:
    return f"{typed.get(variable, f'{variable}=')}{value}"


def _listed(value: str) -> list[str]:
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


# --- flags, on the command line and in the engine's config file --------------------------------------------


@dataclass(frozen=True)
class Given:
    """A flag that the user gave: `typed` is what stands in front of its value, `value` what its variable gets."""

    flag: Flag
    typed: str
    value: str

    def __str__(self) -> str:
        return f"{self.typed}{self.value}" if self.flag.takes_value else self.typed.rstrip(": ")


def take_flags(
    argv: list[str], environ: MutableMapping[str, str], in_config: Iterable[Given] = ()
) -> dict[str, str]:
    """Move mmlane's flags from `argv` (edited in place) to `environ`; both `--flag value` and `--flag=value`.

    in_config: those of the engine's config file (`flags_in_config`), which hold where the command line has none.
    Returns, by variable that was set, what the user typed in front of the value. Raises `SettingsError` for an
    unknown --mmlane flag, a missing or a wrong value, and for two values of one flag; those of a list add up.
    """
    on_line, rest = _flags_on_line(argv)
    given = {**_settled(in_config), **_settled(on_line)}
    environ.update((variable, flag.value) for variable, flag in given.items())
    typed = {variable: flag.typed for variable, flag in given.items()}
    read(environ, typed)  # a wrong value is refused here, where the user typed it
    argv[:] = rest
    return typed


def flags_in_config(argv: list[str]) -> list[Given]:
    """mmlane's keys in the YAML file that `--config` of the engine's command line names, as in `mmlane: backport`.

    As in the engine, a key is a flag without its dashes; here `_` is as good as `-`. What is wrong with the file,
    or with the way it is named, is the engine's to report: there are no keys then. Raises `SettingsError` as for
    flags.
    """
    name = _config_name(argv)
    keys = {} if name is None else _top_level(Path(name))
    return [_in_config(f"{name}: {key}", key, value) for key, value in keys.items() if is_ours(key)]


def is_ours(key: Any) -> bool:
    """Whether a key of the engine's config file is meant for mmlane."""
    return isinstance(key, str) and key.startswith("mmlane")


def _flags_on_line(argv: list[str]) -> tuple[list[Given], list[str]]:
    """What was given on a command line, and the words that are left."""
    given: list[Given] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--mmlane"):
            rest.append(word)
            continue
        flag = _flag(name, name)
        if not flag.takes_value:
            if equals:
                raise SettingsError(f"{name} takes no value, got {value!r}")
            given.append(Given(flag, name, "1"))
            continue
        if not equals:
            value = next(words, "")
            if value.startswith("--"):
                value = ""
        given.append(Given(flag, f"{name}{equals or ' '}", _not_empty(flag, name, value)))
    return given, rest


def _flag(name: str, typed: str) -> Flag:
    """The flag of that name. Raises `SettingsError`, which names the one that may have been meant."""
    flags = {flag.name: flag for flag in FLAGS}
    if name in flags:
        return flags[name]
    nearest = _nearest(name.removeprefix("--mmlane").strip("-_").replace("-", "_").upper())
    meant = next((flag.name for flag in FLAGS if flag.variable == nearest), f"the variable {nearest}")
    advice = f" (did you mean {meant}?)" if nearest else ""
    raise SettingsError(f"{typed} is not one of: {', '.join(flags)}{advice}")


def _not_empty(flag: Flag, typed: str, value: str) -> str:
    if not _listed(value):
        raise SettingsError(f"{typed} needs a value: {flag.metavar}")
    return value


def _settled(given: Iterable[Given]) -> dict[str, Given]:
    """One for each variable. Raises `SettingsError` for two that say different things."""
    settled: dict[str, Given] = {}
    for later in given:
        first = settled.setdefault(later.flag.variable, later)
        if later.flag.is_list:
            both = _listed(f"{first.value},{later.value}")
            settled[later.flag.variable] = replace(first, value=",".join(both))
        elif first.value.strip().lower() != later.value.strip().lower():
            raise SettingsError(f"{first} and {later} contradict each other; give one of them")
    return settled


def _config_name(argv: list[str]) -> str | None:
    """The config file as the command line names it; None where there is none, or more than one."""
    names = [argv[place + 1] for place, word in enumerate(argv[:-1]) if word == "--config"]
    names += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return names[0] if len(names) == 1 else None


def _top_level(file: Path) -> dict[Any, Any]:
    """What a YAML file holds; nothing where it cannot be read, or is not of a form that the engine takes."""
    if file.suffix.lower() not in (".yaml", ".yml") or not file.is_file():  # a pipe can be read but once
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        if "mmlane" not in text:
            return {}
        import yaml

        found = yaml.safe_load(text)
    except Exception:  # noqa: BLE001 - the engine reads the same file, and says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _in_config(typed: str, key: str, value: Any) -> Given:
    flag = _flag("--" + key.replace("_", "-"), typed)
    if flag.takes_value:
        words = value if isinstance(value, list) else [value]
        return Given(flag, f"{typed}: ", _not_empty(flag, typed, ",".join(map(_word, words))))
    if value not in (0, 1):
        raise SettingsError(f"{typed}: {_word(value)} is not one of: true, false")
    return Given(flag, f"{typed}: ", str(int(value)))


def _word(value: Any) -> str:
    """A value of YAML as it is written: there, `off` is a truth value."""
    if value is None:
        return ""
    return ("off", "on")[value] if isinstance(value, bool) else str(value)
