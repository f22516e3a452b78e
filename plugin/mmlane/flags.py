"""The --mmlane* flags, on the engine's command line and in its config file.

They are taken off the command line before the engine parses it, and carried to child processes as the variables of
the same meaning (`settings`). A flag wins over its variable, and one on the command line over one in the config
file. Standard library only, but for a config file.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmlane.settings import MODES, SettingsError, listed, nearest, read


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
    return [_in_config(f"{name}: {key}", key, value) for key, value in keys.items() if is_mmlane_key(key)]


def is_mmlane_key(key: Any) -> bool:
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
    variable = nearest(name.removeprefix("--mmlane").strip("-_").replace("-", "_").upper())
    meant = next((flag.name for flag in FLAGS if flag.variable == variable), f"the variable {variable}")
    advice = f" (did you mean {meant}?)" if variable else ""
    raise SettingsError(f"{typed} is not one of: {', '.join(flags)}{advice}")


def _not_empty(flag: Flag, typed: str, value: str) -> str:
    if not listed(value):
        raise SettingsError(f"{typed} needs a value: {flag.metavar}")
    return value


def _settled(given: Iterable[Given]) -> dict[str, Given]:
    """One for each variable. Raises `SettingsError` for two that say different things."""
    settled: dict[str, Given] = {}
    for later in given:
        first = settled.setdefault(later.flag.variable, later)
        if later.flag.is_list:
            both = listed(f"{first.value},{later.value}")
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
