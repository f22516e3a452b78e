"""`mmlane serve`: the engine's launcher, with the startup hook also where Python runs no .pth file."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import typer
from typer.core import TyperCommand

NAME = "serve"


class ServeCommand(TyperCommand):
    """All words after its name are the engine's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def serve(ctx: typer.Context) -> None:
    """Start the engine: `python -m sglang.launch_server`, in which mmlane needs no .pth file.

    All that follows is the engine's, also --help. mmlane's own flags work as they do there.

    For a Python that runs no .pth file: -S, packages installed with --target or found by PYTHONPATH, a zip
    application. Processes that the engine spawns have mmlane as well.

    Exit code: the engine's; 3 no sglang in this environment.
    """
    launch(ctx.args)


def launch(arguments: list[str]) -> None:
    """Run the engine's launcher with these arguments as the main module of this process."""
    sys.argv[1:] = arguments
    runpy.run_module("mmlane.launcher", run_name="__main__", alter_sys=True)
