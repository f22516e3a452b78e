"""The command `mmlane`: look at what the plugin does on this machine, and switch it."""

from __future__ import annotations

from typing import Annotated

from mmlane import PREFIX, __version__

try:
    import typer

    from mmlane.cli.bench import bench
    from mmlane.cli.doctor import DoctorCommand, doctor
    from mmlane.cli.status import off, on, status
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("mmlane"):
        raise
    advice = "leave out Python's -S if it is there, or reinstall mmlane with pip"
    raise SystemExit(f"{PREFIX}{missing}, which the command needs; {advice}") from None

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command(cls=DoctorCommand)(doctor)
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
    """The command `mmlane`: look at what the plugin does on this machine, and switch it."""


def main() -> None:
    """Run the command line."""
    app()
