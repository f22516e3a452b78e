"""The producing process of one way of `mmlane bench`, which also forks its readers. Run by team.py:

    PYTHON -m mmlane.bench.worker --orders FD --parent PID --module mmlane.bench.via_... [--mode MODE] ...

`MMLANE` says whether mmlane is in the engine here. Takes orders from a pipe, answers each; a fault ends the
process, and with it the readers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from mmlane.bench.workers import answer_of, die_with, obey


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--orders", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--mode")
    parser.add_argument("--readers", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    with Connection(arguments.orders) as orders:
        answer = answer_of(_made, arguments)
        if answer[0] != "ok":
            orders.send(answer)
            return
        producing, notes = answer[1]
        orders.send(("ok", notes))
        if obey(orders, producing, until_fault=True):
            producing.quit()


def _made(arguments: argparse.Namespace) -> tuple[object, list[str]]:
    """What takes orders; and what mmlane says against the patches that this engine was to get."""
    import torch

    from mmlane.bench.producing import Producing, Setup, fork_readers

    torch.set_num_threads(1)  # more would not survive the fork
    if os.environ.get("MMLANE") != "off":
        from mmlane import entry

        entry.start("bench")  # the startup hook may have done it
    module = importlib.import_module(arguments.module)
    resource_tracker.ensure_running()  # one for all of them, as where processes are spawned
    gc.collect()
    gc.freeze()
    gc.disable()
    producer = module.Producer(arguments.scratch, arguments.mode)
    setup = Setup(arguments.readers, 1, arguments.scratch, arguments.mode)
    return Producing(producer, fork_readers(module, setup)), _notes()


def _notes() -> list[str]:
    from mmlane import entry

    return [] if entry.session is None else list(map(str, entry.session.report().trouble()))


if __name__ == "__main__":
    main()
