"""The command `mmlane`: look at what the plugin does here, switch it, and start an engine with it."""

from __future__ import annotations

import sys
from typing import Annotated

from mmlane import PREFIX, __version__

try:
    import typer

    from mmlane.cli.bench import bench
    from mmlane.cli.doctor import DoctorCommand, doctor
    from mmlane.cli.serve import NAME, ServeCommand, launch, serve
    from mmlane.cli.status import off, on, status
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("mmlane"):
        raise
    advice = "leave out Python's -S if it is there, or reinstall mmlane with pip"
    raise SystemExit(f"{PREFIX}{missing}, which the command needs; {advice}") from None

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
app.command(cls=DoctorCommand)(doctor)
app.command(NAME, cls=ServeCommand, add_help_option=False)(serve)
app.command()(status)
app.command(cls=DoctorCommand)(bench)
app.command()(off)
app.command()(on)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmlane {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The command `mmlane`: look at what the plugin does here, switch it, and start an engine with it."""


def main() -> None:
    """Run the command line. An engine does not run inside of typer, which has its own ways with what it raises."""
    if sys.argv[1:2] == [NAME]:
        launch(sys.argv[2:])
        return
    # No shell can complete the words of `python -m mmlane`: what is shown or installed there is for the script.
    words = ("--install-completion", "--show-completion")
    app(prog_name="mmlane" if any(word.startswith(words) for word in sys.argv[1:]) else None)
