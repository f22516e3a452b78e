"""`python -m tools.shards usual|all`: which pieces of the matrix the CI runs, each in a job of its own; JSON.

The pieces are those of `tools.matrix`, so a release that is added to the table has a job. `usual`: the releases of
`make test`, and the tests that belong to no release. `all`: what `make matrix` runs.
"""

from __future__ import annotations

import argparse
import json
import sys

from mmlane.compat import matrix
from tools.matrix import pieces


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.shards", description=__doc__)
    parser.add_argument("which", choices=("usual", "all"))
    usual = {*map(str, matrix().usual), "no-release"}
    chosen = parser.parse_args(arguments).which
    names = [piece.name for piece in pieces() if chosen == "all" or piece.name in usual]
    print(json.dumps(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
