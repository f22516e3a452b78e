"""`python -m tools.settings_table`: the settings of `mmlane.settings` and their flags, in docs/settings.md.

`--check` writes nothing, and exits with 1 when the page does not say what the code says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from mmlane.flags import FLAGS
from mmlane.settings import FORMER, LOGS, MODES, OF_FIELD, PINNED, SWEEPS, Settings
from tools.compat_table import ROOT, NoMarkers

FILE = "docs/settings.md"
START = "<!-- settings-table:start -->"
END = "<!-- settings-table:end -->"


class Text(NamedTuple):
    """A setting: its values, the one that it has by default, what it does, and what each value does."""

    values: str
    default: str
    does: str
    of_value: dict[str, str]


def texts() -> dict[str, Text]:
    """By field of `Settings`, in the order of `OF_FIELD`."""
    default = Settings()
    return {
        "mode": Text(
            _alternatives(MODES),
            f"`{default.mode}`",
            "What mmlane does.",
            {
                "lane": "The patches that this engine lacks, and the [lane](engine.md) as transport.",
                "backport": "The patches that this engine lacks; features travel by shared-memory segments.",
                "off": "Nothing at all.",
            },
        ),
        "disable": Text(
            "`ID,...`",
            "none",
            "Turns off these patches and every patch that depends on them: the rest of their group, and `lane` "
            "where it is one of `shm_pointer`, `deferred_unwrap`, `tp_barrier`, `fan_out`. "
            "[Compatibility](compatibility.md) has the ids.",
            {},
        ),
        "strict": Text(
            "`0`, `1`",
            f"`{int(default.strict)}`",
            "What happens when a patch that this engine lacks cannot be applied.",
            {
                "0": "mmlane skips the patch and its group, and says so in one line.",
                "1": "The engine does not start.",
            },
        ),
        "log": Text(
            _alternatives(LOGS),
            f"`{default.log}`",
            "What mmlane prints on standard error at start. While the engine serves, lines go by its "
            "`--log-level`.",
            {
                "debug": "The block, and one line from every process.",
                "info": "One block of at most six lines, and what needs attention.",
                "warning": "Only what needs attention.",
            },
        ),
        "capacity": Text(
            "MiB, 1 or more",
            "a quarter of the memory of the machine or control group, divided by `--tokenizer-worker-num`",
            "The most that one tokenizer's lane may hold. [Sizing](sizing.md) has an example.",
            {},
        ),
        "pinned": Text(
            "MiB, 0 or more",
            f"`{PINNED >> 20}`, divided by `--tokenizer-worker-num`",
            "On CUDA: how much of one tokenizer's lane is [pinned](gpu.md). Pinned memory stays committed.",
            {"0": "Nothing is pinned, and features can be written to in place."},
        ),
        "sweep": Text(
            _alternatives(SWEEPS),
            f"`{default.sweep}`",
            "Whether a start removes [what a crashed engine left](troubleshooting.md#what-a-crashed-engine-left) "
            "in `/dev/shm`.",
            {
                "0": "It removes nothing.",
                "1": "It removes what is provably dead.",
                "private": "The same, and more can be proven: no other container uses this `/dev/shm`.",
            },
        ),
    }


def table() -> str:
    """One row for each setting, then what each of their values means."""
    flags = {flag.variable: flag for flag in FLAGS}
    written = texts()
    if list(written) != list(OF_FIELD):
        raise ValueError(f"wanted a text for each of {', '.join(OF_FIELD)}, found {', '.join(written)}")
    lines = ["| variable | flag | values | default |", "| --- | --- | --- | --- |"]
    for field, variable in OF_FIELD.items():
        flag = flags.get(variable)
        name = "" if flag is None else f"`{flag.name}`" + (" (no value)" if not flag.takes_value else "")
        text = written[field]
        lines.append(f"| [`{variable}`](#{variable.lower()}) | {name} | {text.values} | {text.default} |")
    for field, variable in OF_FIELD.items():
        text = written[field]
        lines += ["", f"### `{variable}`", "", text.does]
        if text.of_value:
            lines += ["", "| value | meaning |", "| --- | --- |"]
            lines += [f"| `{value}` | {meaning} |" for value, meaning in text.of_value.items()]
    former = ", ".join(f"`{old}` is accepted for `{new}`" for old, new in FORMER.items())
    return "\n".join([*lines, "", f"Former names: {former}, with one line, until 0.2.0."])


def filled(text: str) -> str:
    """The text of the page with the table in its place. Raises `NoMarkers` where there is no place for it."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise NoMarkers(f"{FILE}: wanted one {START} and one {END} after it, each on a line of its own")
    return f"{text.partition(START)[0]}{START}\n{table()}\n{END}{text.partition(END)[2]}"


def _alternatives(values: tuple[str, ...]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def main(arguments: list[str] | None = None, file: Path = ROOT / FILE) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.settings_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is stale")
    options = parser.parse_args(arguments)
    text = file.read_text(encoding="utf-8")
    try:
        right = filled(text)
    except NoMarkers as problem:
        print(problem, file=sys.stderr)
        return 1
    if text == right:
        return 0
    if options.check:
        print(f"{FILE} is stale: run `python -m tools.settings_table`", file=sys.stderr)
        return 1
    file.write_text(right, encoding="utf-8")
    print(f"wrote the settings in {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
