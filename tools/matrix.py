"""`python -m tools.matrix`: contract, engine and installation tests, one piece after the other.

A piece is the contract tests, all engine tests of one release, those that belong to no release, or tests/install.
One that has passed with the same engine and the same tree is not run again. A piece that fails does not stop the
others. Ctrl-C ends the running one and keeps what has passed. The table at the end has a row for each; exit status
1: not all passed.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mmlane
from devkit.cache import cache_root
from devkit.installer import InstallError
from mmlane.compat import matrix
from tools.pieces import COUNTS, Piece, Result, Results, run

CHECKOUT = Path(__file__).resolve().parent.parent
TRANSCRIPTS = "tests/engine/transcripts"  # made anew by each release's piece, read by the others

# What decides the results.
_ALL = (
    *("plugin", "patches", "compat_matrix.yaml", "devkit", "tests/conftest.py"),
    *("pyproject.toml", "requirements-test.txt", "requirements-dev.txt"),
)
_CONTRACT = (  # the documents have generated tables, and make a site
    *(*_ALL, "tests/contract", "tools", "mkdocs.yml"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs"),
)
_ENGINE = (*_ALL, "tests/engine")
_INSTALL = (*_ALL, "tests/install", "tests/engine/forks.py", "tools/pythons.py", "README.md")

LIMIT_MINUTES = 120.0
_BEFORE = "pass, before"
_WIDTH = 160
_GIB = 1 << 30
_BASE = 3.2 * _GIB  # the environment that all engines share
_BUILT = 0.3 * _GIB  # one engine, with its unpacked wheel, on average: 0.5.9 takes 0.2, 0.5.23 takes 0.45
_SPARE = 1.0 * _GIB


def pieces() -> list[Piece]:
    """All that `pytest tests/contract tests/engine tests/install --engines all` collects, each test in one."""
    releases = tuple(str(version) for version in matrix().engines)
    return [
        Piece("contract", ("tests/contract",), _CONTRACT, releases),
        *(
            Piece(
                release,
                ("tests/engine", "--transcripts", "anew", "--all-of", release),
                (*_ENGINE, f":(exclude){TRANSCRIPTS}"),
                (release,),
                writes=(f"{TRANSCRIPTS}/{release}.yaml",),
            )
            for release in releases
        ),
        Piece("no-release", ("tests/engine", "--all-of", "no-release"), _ENGINE, releases),
        Piece("install", ("tests/install", "--engines", "all"), _INSTALL, releases),
    ]


def go(
    chosen: Sequence[Piece],
    tree: Path,
    results: Results,
    console: Console,
    *,
    again: bool = False,
    limit_s: float = LIMIT_MINUTES * 60,
) -> int:
    """Run what has not passed yet; print the table; the exit status."""
    found: dict[str, Result] = {}
    status = 0
    with _alone(results.directory):
        for piece in chosen:
            try:
                found[piece.name] = _one(piece, tree, results, console, again=again, limit_s=limit_s)
            except KeyboardInterrupt:
                found[piece.name] = Result("interrupted")
                status = 128 + signal.SIGINT
                break
    console.print(_table(chosen, found))
    for line in _notes(chosen, found):
        console.print(line, markup=False)
    if all(name in found and _good(found[name]) for name in (piece.name for piece in chosen)):
        return 0
    return status or 1


def _good(result: Result) -> bool:
    return result.outcome.startswith("pass")


def _one(piece: Piece, tree: Path, results: Results, console: Console, *, again: bool, limit_s: float) -> Result:
    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M')} {piece.name}: {text}", markup=False, soft_wrap=True)

    try:
        key = piece.key(tree)
        before = results.passed(piece, key, tree)
    except (InstallError, OSError) as error:
        say(f"not run: {error}")
        return Result("not run", note=str(error))
    if before and not again:
        say(f"passed before, {before.when}")
        return replace(before, outcome=_BEFORE)
    log = results.log(piece, key)
    say(f"running; {log}")
    result = run(piece, tree, log, limit_s)
    if problem := _keep(result, piece, key, tree, results):
        result = replace(result, note=f"{problem}: the result is not kept")
    say(f"{result.outcome}; {result.minutes:.1f} minutes")
    return result


def _keep(result: Result, piece: Piece, key: str, tree: Path, results: Results) -> str:
    """Keep a result; else the reason why not."""
    try:
        if piece.key(tree) != key:
            return "files changed while it ran"
        results.keep(piece, key, replace(result, wrote=piece.wrote(tree)))
    except (InstallError, OSError) as error:  # such as a file that is no longer there
        return str(error)
    return ""


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two runs at once would only slow each other down, and share logs."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run holds {directory / 'lock'}: wait for its end") from None
        yield


def _table(chosen: Sequence[Piece], found: Mapping[str, Result]) -> Table:
    table = Table()
    for heading in ("release", "result"):
        table.add_column(heading, no_wrap=True)
    for heading in (*COUNTS, "minutes"):
        table.add_column(heading, justify="right")
    table.add_column("ended", no_wrap=True)
    table.add_column("log", overflow="fold")
    for piece in chosen:
        r = found.get(piece.name, Result("not run"))
        cells = [str(getattr(r, count)) for count in COUNTS]
        table.add_row(piece.name, r.outcome, *cells, f"{r.minutes:.1f}", r.when, r.log)
    good = [r for r in found.values() if _good(r)]
    everything = [str(sum(getattr(r, count) for r in found.values())) for count in COUNTS]
    minutes = sum(r.minutes for r in found.values() if r.outcome != _BEFORE)  # of what ran now
    table.add_section()
    table.add_row(f"{len(good)} of {len(chosen)}", "pass", *everything, f"{minutes:.1f}")
    return table


def _notes(chosen: Sequence[Piece], found: Mapping[str, Result]) -> Iterator[str]:
    for piece in chosen:
        if piece.name in found and found[piece.name].note:
            yield f"{piece.name}: {found[piece.name].note}"
    reasons: Counter[str] = Counter()
    for result in found.values():
        reasons.update(result.reasons)
    for reason, count in reasons.most_common():
        yield f"skipped {count} x: {reason}"


def room(releases: Sequence[str]) -> str:
    """A line on what the engines that are not built yet will take. Raises SystemExit where there is no room."""
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    missing = [release for release in releases if not (cache / "engines" / release).exists()]
    needed = len(missing) * _BUILT + (_BASE if missing and not any(cache.glob("base-*")) else 0)
    free = shutil.disk_usage(cache).free
    sizes = f"about {needed / _GIB:.1f} GiB; {free / _GIB:.1f} GiB are free"
    line = f"{len(missing)} engines to build under {cache}: {sizes}"
    if needed and free < needed + _SPARE:
        raise SystemExit(f"{line}: make room, choose fewer releases (--only), or another disk (MMLANE_CACHE)")
    return line


def main(
    arguments: list[str] | None = None, available: Sequence[Piece] | None = None, tree: Path = CHECKOUT
) -> int:
    """`available`: other pieces than the matrix's, in another tree; for tests."""
    every = {piece.name: piece for piece in available or pieces()}
    parser = argparse.ArgumentParser(
        prog="python -m tools.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--only", metavar="V,...", help=f"some pieces: {', '.join(every)}")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_MINUTES, metavar="MINUTES", help="for each piece (%(default)g)"
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(every)
    if unknown := [name for name in names if name not in every]:
        parser.error(f"--only {unknown[0]}: wanted some of {', '.join(every)}")
    if available is None and not Path(mmlane.__file__).is_relative_to(CHECKOUT):
        parser.error(f"wanted the mmlane of {CHECKOUT}, found {mmlane.__file__}: what is tested is another tree")
    chosen = [piece for name, piece in every.items() if name in names]
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)  # a narrow table is not readable
    built = [piece.name for piece in chosen if piece.releases == (piece.name,)]
    console.print(room(built), markup=False)
    for signum in (signal.SIGINT, signal.SIGTERM):  # also where Ctrl-C was ignored, as in a shell's background
        signal.signal(signum, signal.default_int_handler)
    return go(
        chosen,
        tree,
        Results(cache_root() / "matrix"),
        console,
        again=options.again,
        limit_s=options.limit * 60,
    )


if __name__ == "__main__":
    sys.exit(main())
