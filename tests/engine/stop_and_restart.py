"""Everything that mmlane has put into an engine goes when it stops, and comes again. A test runs:

    PYTHON_OF_AN_ENGINE_WITH_MMLANE stop_and_restart.py

At the end it prints the help of the engine's command line, which has mmlane's flags.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

NAMES = ("mm_utils", "io_struct", "tokenizer_manager", "scheduler")


def main() -> None:
    for name in NAMES:
        importlib.import_module(f"sglang.srt.managers.{name}")
    from mmlane import entry

    assert entry.session is not None
    replaced: list[Any] = [r for d in entry.session.patcher.decisions.values() for r in d.replaced]
    assert replaced and all(r.in_force() for r in replaced)
    holders = [
        (module, key, r)
        for r in replaced
        for module in list(sys.modules.values())
        if module is not None and getattr(module, "__name__", "").startswith("sglang")
        for key, value in list(vars(module).items())
        if value is r.installed
    ]
    entry.stop()

    def engines_own(r: Any) -> Any:  # below the patches that wrap each other
        under = [other for other in replaced if other.installed is r.original]
        return engines_own(under[0]) if under else r.original

    for r in replaced:
        assert vars(r.owner)[r.attribute] is engines_own(r), r.target.path
    for module, key, r in holders:
        assert vars(module)[key] is engines_own(r), (module, key)
    entry.start("again")
    assert entry.session is not None
    assert all(r.in_force() for d in entry.session.patcher.decisions.values() for r in d.replaced)
    parser = argparse.ArgumentParser()
    sys.modules["sglang.srt.server_args"].ServerArgs.add_cli_args(parser)
    print(parser.format_help())
    print("undone", len(replaced), "held elsewhere", len(holders))


if __name__ == "__main__":
    main()
