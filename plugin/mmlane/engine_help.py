"""mmlane's flags in the engine's own `--help`.

The flags themselves are taken off the command line before the engine parses it (`flags.take_flags`), so its
parser only ever meets them in a help text, or where they came too late to count.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from mmlane.flags import FLAGS
from mmlane.patching import Target


class _TooLate(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parser.error(
            f"{self.option_strings[0]} only counts on the command line of the process that starts the engine "
            f"(not in code); set the variable {self.dest} instead"
        )


def _with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_cli_args)
    def add_cli_args_and_ours(parser: argparse.ArgumentParser) -> Any:
        result = add_cli_args(parser)
        group = parser.add_argument_group("mmlane", "What the mmlane plugin does; `mmlane doctor` tells more.")
        for flag in FLAGS:
            group.add_argument(
                flag.name,
                action=_TooLate,
                nargs=None if flag.takes_value else 0,
                dest=flag.variable,
                default=argparse.SUPPRESS,
                metavar=flag.metavar,
                help=f"{flag.help} Same as {flag.variable}.",
            )
        return result

    return add_cli_args_and_ours


HELP = Target("sglang.srt.server_args", "ServerArgs.add_cli_args", "(parser)", _with_flags)
